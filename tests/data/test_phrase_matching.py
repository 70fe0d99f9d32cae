"""Longest match on word boundaries, by itself."""

from __future__ import annotations

import pytest

from lapwan.data.caption_text import PhraseMatcher, SplitText


def find(phrases: str, text: str, taken: tuple[tuple[int, int], ...] = ()) -> list[tuple[int, str]]:
    """Characters are units; a space in `text` is a word edge, and without any every character is a word."""
    units = tuple(text.replace(" ", ""))
    boundary = [" " not in text or at == 0 for at in range(len(units))]
    at = 0
    for char in text:
        if char == " ":
            boundary[at] = True
        else:
            at += 1
    matcher = PhraseMatcher((tuple(phrase), phrase) for phrase in phrases.split())
    return [(match.start, match.value) for match in matcher.find(SplitText(units, (*boundary, True)), taken)]


@pytest.mark.parametrize(("phrases", "text", "expected"), [
    ("ABC B BC", "ABC", [(0, "ABC")]),
    ("ABC B BC", "XBCB", [(1, "BC"), (3, "B")]),
    ("AB BCD", "ABCD", [(1, "BCD")]),  # the longer one, though another begins before it
    ("AB BC", "ABC", [(0, "AB")]),  # of equals the left one
    ("ABC CDE DE", "ABCDE", [(0, "ABC")]),  # DE stands inside CDE, though CDE gave way
    ("A", "A AB BA", [(0, "A")]),  # inside a word there is no edge, at its begin or end
    ("AB", "A B", [(0, "AB")]),  # a phrase of two words
    ("AB", "", []),
])
def test_longest_match(phrases: str, text: str, expected: list[tuple[int, str]]) -> None:
    assert find(phrases, text) == expected


def test_taken_spans_are_left_alone() -> None:
    assert find("AB B", "ABB", taken=((0, 1),)) == [(1, "B"), (2, "B")]
    assert find("AB B", "ABB", taken=((1, 2),)) == [(2, "B")]
