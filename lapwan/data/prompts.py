"""Prompts for alignment, from several file formats, and the split into training and held-out prompts.

    captions.json   [{"caption": "..."}, ...], or a list of strings
    prompts.yaml    prompts: ["...", ...], or a list of strings
    clips.jsonl     one object per line with a "caption"
    anything else   text, one prompt per line

How to add a format: a case in `read_prompts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lapwan import rng
from lapwan.data.caption_text import TOKEN
from lapwan.data.clip_file import read_clips
from lapwan.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """The distinct prompts of a file, in its order and stripped of white space.

    Raises:
        UserError: the file cannot be read, has another form, or holds no prompt.
    """
    match path.suffix.lower():
        case ".jsonl":
            lines: Iterable[str] = [clip.caption for clip in read_clips(path)]
        case ".json":
            lines = _captions(_json(path), path, "a list of objects with a \"caption\", or of strings")
        case ".yaml" | ".yml":
            lines = _captions(_yaml(path), path, "`prompts:` with a list, or a list")
        case _:
            lines = _text(path).splitlines()
    prompts = list(dict.fromkeys(text for line in lines if (text := line.strip())))
    if not prompts:
        raise UserError(f"{path} contains no prompt")
    return prompts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"cannot read {path}: {reason}; prompts are captions.json, prompts.yaml, clips.jsonl, or text "
                        "with one per line") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {message}") from None


def _captions(value: Any, path: Path, expected: str) -> list[str]:
    rows = value.get("prompts", value.get("captions")) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected {expected}")
    texts: list[Any] = [row.get("caption", row.get("prompt")) if isinstance(row, dict) else row for row in rows]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise UserError(f"{path}: entry {number} is {json.dumps(rows[number - 1], ensure_ascii=False)[:60]}; "
                            f"expected {expected}")
    return texts


def choose_held_out(prompts: Sequence[str], count: int, seed: int) -> set[str]:
    """`count` of the prompts, chosen by seed and text, so that the rank of a prompt does not depend on the others.

    Raises:
        UserError: nothing would be left to train on.
    """
    distinct = list(dict.fromkeys(prompts))
    if count >= len(distinct):
        raise UserError(f"held_out.count = {count} of {len(distinct)} distinct prompts leaves none to train on; set it "
                        f"to at most {len(distinct) - 1}")
    return set(sorted(distinct, key=lambda text: (rng.seed_of(seed, "held out", text), text))[:count])


def count_chinese(prompts: Iterable[str]) -> int:
    """The number of prompts with Chinese (Japanese, Korean) characters."""
    return sum(any(match.lastgroup == "han" for match in TOKEN.finditer(prompt)) for prompt in prompts)
