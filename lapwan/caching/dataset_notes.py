"""What the plan says about a dataset's clips before the work: captions that are cut, clips that are there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lapwan import console
from lapwan.console import listed
from lapwan.data.caption_text import is_han
from lapwan.data.clips import CacheSet, SourceClip
from lapwan.data.duplicates import look_alikes, same_files
from lapwan.errors import UserError
from lapwan.faults import library_reads
from lapwan.models.configs import check_tokenizer

_WIDEST = 120  # characters of an item
# Tokens of umT5 by kind of character, measured on surgical captions: an estimate where its tokenizer is not there.
_PER_IDEOGRAPH, _PER_CHARACTER = 0.75, 0.28


def dataset_notes(cache: CacheSet, tokenizer: Path, length: int, near: bool) -> tuple[str, ...]:
    """Lines for the plan.

    Args:
        tokenizer: the folder of the text encoder's tokenizer, if it is there.
        length: most tokens of a caption.
        near: look for clips that look the same; this decodes three frames of each.
    """
    notes = _long_captions(cache.clips, tokenizer, length)
    paths = [clip.path for clip in cache.clips]
    twice = Counter((clip.path, clip.caption, clip.start) for clip in cache.clips)
    notes += _listed("listed twice with the same caption", [
        f"{path.name} ({count} times)" for (path, _, _), count in twice.items() if count > 1])
    groups = same_files(paths)
    notes += _listed("the same file under several names", [" = ".join(path.name for path in group) for group in groups])
    if near:
        with console.progress("compare", len(set(paths)), "clip") as bar:
            alike = look_alikes(paths, lambda: bar.advance(1))
        equal = [set(group) for group in groups]
        notes += _listed("clips that look the same", [
            " = ".join(path.name for path in group) for group in alike if set(group) not in equal])
    return tuple(notes)


def _listed(what: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    items = [item if len(item) <= _WIDEST else item[:_WIDEST - 1] + "…" for item in items]
    return [f"{what}: {len(items)}: {listed(items, between='; ')}"]


def _long_captions(clips: Sequence[SourceClip], tokenizer: Path, length: int) -> list[str]:
    # A token is at least a character of ordinary text, so a caption of fewer cannot be too long.
    candidates = [clip for clip in clips if len(clip.caption) > length - 2]
    if not candidates:
        return []
    counts = _token_counts([clip.caption for clip in candidates], tokenizer)
    about = "" if counts is not None else "about (an estimate: the model's tokenizer is not there) "
    if counts is None:
        counts = [estimated_tokens(clip.caption) for clip in candidates]
    long = [f"{clip.name} ({about}{count} tokens)" for clip, count in zip(candidates, counts, strict=True)
            if count > length]
    return [f"captions over {length} tokens, cut there: {len(long)}: {line.split(': ', 2)[2]}"
            for line in _listed("long", long)]


def _token_counts(captions: Sequence[str], tokenizer: Path) -> list[int] | None:
    if not tokenizer.is_dir():
        return None
    from transformers import AutoTokenizer

    from lapwan.wan.text import clean_prompt

    try:
        check_tokenizer(tokenizer)
        with library_reads("the tokenizer", tokenizer):
            loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except UserError:
        return None
    return [len(loaded(clean_prompt(caption), add_special_tokens=True).input_ids) for caption in captions]


def estimated_tokens(caption: str) -> int:
    """About as many tokens of umT5 as a caption has."""
    ideographs = sum(map(is_han, caption))
    return round(_PER_IDEOGRAPH * ideographs + _PER_CHARACTER * (len(caption) - ideographs)) + 1
