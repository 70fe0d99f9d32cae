"""Longest match of phrases on word boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """A text in units (see `lapwan.data.text.units`); `boundary[i]`: a word begins or ends before unit i.

    `boundary` has one entry more than `units`: the end of the text.
    """

    units: tuple[str, ...]
    boundary: tuple[bool, ...]


@dataclass(frozen=True)
class Found(Generic[T]):
    """`what` stands at units[start:end]."""

    start: int
    end: int
    what: T


class Matcher(Generic[T]):
    """Finds phrases bounded by word edges: longer before shorter, then left before right, without overlap.

    A phrase inside an occurrence of a longer one is never found, even where that one gave way to a third.
    """

    def __init__(self, phrases: Iterable[tuple[tuple[str, ...], T]]) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], T]]] = {}
        for phrase, what in sorted(phrases, key=lambda p: -len(p[0])):
            self._by_first.setdefault(phrase[0], []).append((phrase, what))
        self.first_units = frozenset(self._by_first)

    def find(self, text: Split, taken: Sequence[tuple[int, int]] = ()) -> list[Found[T]]:
        """All matches outside the spans of `taken`, in order."""
        if self.first_units.isdisjoint(text.units):
            return []
        blocked = {at for start, end in taken for at in range(start, end)}
        candidates = [
            hit for at in range(len(text.units))
            if text.boundary[at] and (hit := self._longest(text, at, blocked)) is not None
        ]
        found: list[Found[T]] = []
        for hit in sorted(candidates, key=lambda f: (f.start - f.end, f.start)):
            inside = any(c.start <= hit.start and hit.end <= c.end and c is not hit for c in candidates)
            if not inside and not any(f.start < hit.end and hit.start < f.end for f in found):
                found.append(hit)
        return sorted(found, key=lambda f: f.start)

    def _longest(self, text: Split, at: int, blocked: set[int]) -> Found[T] | None:
        for phrase, what in self._by_first.get(text.units[at], ()):
            end = at + len(phrase)
            if text.units[at:end] == phrase and text.boundary[end] and blocked.isdisjoint(range(at, end)):
                return Found(at, end, what)
        return None
