"""Stems: what the cache files of a clip are called by. Each clip keeps its stem for as long as the index knows it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from lapwan.caching.index import CacheIndex
from lapwan.caching.layout import TEXT_END
from lapwan.data.clips import SourceClip
from lapwan.data.suffixes import IMAGE_SUFFIXES

_LONGEST = 180  # bytes
_WINDOW = re.compile(r"(?P<stem>.+)_\d{5,}-\d{3,}", re.DOTALL)


def known_stems(index: CacheIndex | None) -> dict[str, list[str]]:
    """By the path of a clip the stems that an index has for it, in the order of its items.

    A path has several if several lines name it. Stems of different clips whose latents would be one file are left out.
    """
    if index is None:
        return {}
    shared = Counter(item.latents for item in index.items)
    stems: dict[str, list[str]] = {path: [stem] for path, stem in index.stems.items()}
    for item in index.items:
        stem = item.text.removesuffix(TEXT_END)
        if item.clip is not None and shared[item.latents] == 1 and stem not in stems.setdefault(item.clip, []):
            stems[item.clip].append(stem)
    return stems


def unique_stems(clips: Sequence[SourceClip], known: Mapping[str, Sequence[str]]) -> list[str]:
    """One stem per clip: the one it has, else that of its file, with a hash of the path appended if that is taken.

    An image called `a_00000-017` would have the file names of a window of the video `a`: it takes the stem `a` too.

    Args:
        known: stems by path, from an earlier index.
    """
    stems: dict[int, str] = {}
    taken: set[str] = set()
    uses: Counter[str] = Counter()
    for number, clip in enumerate(clips):
        earlier = known.get(clip.key, ())
        if uses[clip.key] < len(earlier):
            stem = earlier[uses[clip.key]]
            if _folded(stem) not in taken:
                stems[number] = stem
                taken |= _claims(stem, clip)
        uses[clip.key] += 1
    for number, clip in enumerate(clips):
        if number in stems:
            continue
        base, attempt = _short(clip.stem), 0
        stem = base
        while _claims(stem, clip) & taken:
            digest = hashlib.sha256(f"{clip.key}\0{attempt}".encode(errors="surrogateescape")).hexdigest()
            stem, attempt = f"{base}-{digest[:8]}", attempt + 1
        taken |= _claims(stem, clip)
        stems[number] = stem
    return [stems[number] for number in range(len(clips))]


def _claims(stem: str, clip: SourceClip) -> set[str]:
    """The stems that no other clip may have beside this one."""
    window = _WINDOW.fullmatch(stem) if clip.path.suffix.lower() in IMAGE_SUFFIXES else None
    return {_folded(stem)} if window is None else {_folded(stem), _folded(window["stem"])}


def _folded(stem: str) -> str:
    """Some file systems do not tell A.mp4 from a.mp4, some not \u00e9 as one character from \u00e9 as two."""
    return unicodedata.normalize("NFC", stem).casefold()


def _short(stem: str) -> str:
    """The stem, shortened so that cache and temporary file names stay within 255 bytes."""
    raw = stem.encode(errors="surrogateescape")
    if len(raw) <= _LONGEST:
        return stem
    cut = raw[: _LONGEST - 9].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(raw).hexdigest()[:8]}"
