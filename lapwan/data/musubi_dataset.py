"""musubi-tuner's dataset file to the clips of its datasets, one cache folder each."""

from __future__ import annotations

from pathlib import Path

from lapwan import console
from lapwan.data.buckets import Buckets
from lapwan.data.sources import CacheSet, Drop, Extraction, SourceClip, read_jsonl
from lapwan.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from lapwan.data.windows import round_frames
from lapwan.errors import UserError
from lapwan.settings.dataset import SOURCES, DatasetEntry, read_entries


def read_musubi_dataset(path: Path, output: Path | None, step: int, stride: int) -> list[CacheSet]:
    """One CacheSet a dataset.

    Args:
        output: where the cache of a dataset without `cache_directory` goes; several get numbered folders in it.
        step: the size step of buckets; stride: frames of a latent frame.

    Raises:
        UserError: a wrong file, a missing folder, or two datasets with one cache folder.
    """
    entries = read_entries(path)
    homeless = sum(entry.cache_directory is None for entry in entries)
    found: list[CacheSet] = []
    for number, entry in enumerate(entries):
        place = f"{path}, datasets[{number}]"
        clips, drops, taxonomy = _clips(entry, path, place)
        folder = _cache_folder(entry, path, output, number if homeless > 1 else None, place)
        same = next((at for at, other in enumerate(found) if other.folder.absolute() == folder.absolute()), None)
        if same is not None:
            raise UserError(f"{place}: cache folder {folder} is that of datasets[{same}] too; give each its own")
        found.append(CacheSet(folder, path, _extraction(entry, step, stride, place), clips, drops, entry.num_repeats,
                              taxonomy))
    if any(entry.batch_size > 1 for entry in entries):
        console.log(f"{path}: batch_size is for training; set it in the training settings")
    return found


def _extraction(entry: DatasetEntry, step: int, stride: int, place: str) -> Extraction:
    width, height = entry.resolution
    if not entry.enable_bucket and (width % step or height % step):
        near = [max(step, round(side / step) * step) for side in entry.resolution]
        raise UserError(f"{place}: resolution [{width}, {height}] ([width, height]): both must be multiples of {step}; "
                        f"try {near}, or enable_bucket")
    rounded = tuple(sorted({round_frames(frames, stride) for frames in entry.target_frames}))
    if rounded != tuple(sorted(set(entry.target_frames))):
        console.warn(f"{place}: target_frames {list(entry.target_frames)} are rounded down to {list(rounded)} "
                     f"({stride}N+1)")
    return Extraction(Buckets(entry.resolution, entry.enable_bucket, entry.bucket_no_upscale, step), rounded,
                      entry.frame_extraction, entry.frame_stride, entry.frame_sample, entry.max_frames,
                      entry.source_fps)


def _clips(
    entry: DatasetEntry, path: Path, place: str
) -> tuple[tuple[SourceClip, ...], tuple[Drop, ...], str | None]:
    key = next(key for key in SOURCES if getattr(entry, key) is not None)
    source = _existing(getattr(entry, key), path, f"{place}.{key}")
    if key.endswith("jsonl_file"):
        if not source.is_file():
            raise UserError(f"{place}.{key}: {source} is no file")
        return read_jsonl(source)
    if not source.is_dir():
        raise UserError(f"{place}.{key}: {source} is no folder")
    suffixes = IMAGE_SUFFIXES if key.startswith("image") else VIDEO_SUFFIXES
    clips: list[SourceClip] = []
    drops: list[Drop] = []
    for file in sorted(source.iterdir()):
        if file.suffix.lower() not in suffixes or not file.is_file():
            continue
        caption = file.with_name(file.stem + str(entry.caption_extension))
        text = caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else None
        if text:
            clips.append(SourceClip(file, str(file), text))
        else:
            reason = f"empty caption {caption.name}" if text == "" else f"no caption file {caption.name}"
            drops.append(Drop(str(file), reason, file.stem))
    if not clips and not drops:
        raise UserError(f"{place}.{key}: {source} holds none of {', '.join(sorted(suffixes))}")
    return tuple(clips), tuple(drops), None


def _cache_folder(entry: DatasetEntry, path: Path, output: Path | None, number: int | None, place: str) -> Path:
    if entry.cache_directory is not None:
        beside = path.absolute().parent / entry.cache_directory
        return beside if beside.is_dir() and not entry.cache_directory.is_dir() else entry.cache_directory
    if output is not None:
        return output if number is None else output / f"{number}"
    own = entry.video_directory or entry.image_directory
    if own is None:
        raise UserError(f"{place}: a JSONL dataset needs cache_directory (or --output DIR)")
    return _existing(own, path, place)


def _existing(given: Path, path: Path, place: str) -> Path:
    """Beside the dataset file, else in the working directory, as musubi reads it."""
    beside = path.absolute().parent / given
    found = [candidate for candidate in dict.fromkeys((beside, Path.cwd() / given)) if candidate.exists()]
    if not found:
        raise UserError(f"{place}: no such path: {given}; looked beside {path.name} and in the working directory")
    if len(found) == 2 and not found[0].samefile(found[1]):
        raise UserError(f"{place}: '{given}' is ambiguous: both {found[0]} and {found[1]} exist; "
                        "write the absolute path")
    return found[0]
