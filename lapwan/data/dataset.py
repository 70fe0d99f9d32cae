"""A dataset, in any form people have one, as the clips to cache.

How to add a form: a function that returns `CacheSet`s and a case in `read_dataset`.
"""

from __future__ import annotations

from pathlib import Path

from lapwan.data.musubi_dataset import read_musubi_dataset
from lapwan.data.source_clips import CacheSet, Extraction, read_jsonl
from lapwan.errors import UserError


def read_dataset(path: Path, folder: Path | None, extraction: Extraction, stride: int = 4) -> list[CacheSet]:
    """The clips of a JSONL file, cut by `extraction`, or of musubi's dataset file, which says itself how to cut.

    Args:
        stride: pixel frames of a latent frame.

    Raises:
        UserError: the file cannot be read or is wrong; missing videos are `drops`, not errors.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"dataset {path}: {kind}; expected clips.jsonl, labels.jsonl or a dataset.toml")
    if path.suffix.lower() in (".toml", ".json"):
        return read_musubi_dataset(path, folder, extraction.buckets.step, stride)
    if folder is None:
        raise UserError("a clips file needs a folder for its cache; add --output DIR")
    clips, drops, taxonomy = read_jsonl(path)
    return [CacheSet(folder, path, extraction, clips, drops, taxonomy=taxonomy)]
