"""A dataset, from a list of clips, a folder, or musubi-tuner's dataset.toml, as the clips to cache.

How to add a list's format: a reader in `clip_tables.py`. A format with sizes and cache folders of its own: a function
that returns `CacheSet`s (see `musubi_dataset.py`) and a case in `read_dataset`.
"""

from __future__ import annotations

from pathlib import Path

from lapwan.data.annotations import RoiUnits
from lapwan.data.buckets import Buckets
from lapwan.data.clips import CacheSet, read_source_clips
from lapwan.data.frame_extraction import Extraction
from lapwan.data.musubi_dataset import is_musubi, read_musubi_dataset
from lapwan.data.text_encoding import AUTO
from lapwan.errors import UserError
from lapwan.models.spec import ModelSpec
from lapwan.settings.cache import CacheSettings

# Settings that a musubi dataset file gives for itself.
_IN_DATASET_FILE = (
    "size", "num_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps", "buckets",
    "bucket_no_upscale",
)


def extraction_from_settings(settings: CacheSettings, spec: ModelSpec) -> Extraction:
    """The sizes and frames to take from each clip; both default to the model's.

    Raises:
        UserError: frames not 4N+1, a size the model does not take, or one of these settings with a dataset file.
    """
    if settings.dataset is not None and is_musubi(settings.dataset):
        changed = [name for name in _IN_DATASET_FILE
                   if getattr(settings, name) != CacheSettings.model_fields[name].default]
        if changed:
            raise UserError(f"{', '.join(changed)}: not allowed with a dataset file; set it in {settings.dataset} "
                            "(resolution, target_frames, frame_extraction, ...)")
    height, width = settings.size or spec.defaults.size
    frames = settings.num_frames or (spec.defaults.num_frames,)
    for count in frames:
        spec.check_clip(count, height, width)
    return Extraction(
        Buckets((width, height), settings.buckets, settings.bucket_no_upscale, spec.pixel_multiple), frames,
        settings.frame_extraction, settings.frame_stride, settings.frame_sample, settings.max_frames,
        settings.source_fps,
    )


def read_dataset(
    path: Path, folder: Path | None, extraction: Extraction, stride: int = 4, encoding: str = AUTO,
    recursive: bool = False, roi_units: RoiUnits = "fractions",
) -> list[CacheSet]:
    """The clips of a dataset, one CacheSet for each cache folder.

    Args:
        folder: the cache folder; a musubi dataset file may name its own instead.
        extraction: sizes and frames for a list or folder; a musubi dataset file gives its own.
        stride: pixel frames per latent frame.
        encoding: of captions, where their bytes do not tell it.
        recursive: of a folder, the sub-folders too.
        roi_units: of boxes in a list whose lines do not say it.

    Raises:
        UserError: the file cannot be read or is wrong. Clips whose video is missing are `drops`, not errors.
    """
    if not path.exists():
        raise UserError(f"dataset {path}: no such file; expected a folder of videos with captions, clips.jsonl, "
                        "labels.jsonl, a CSV or TSV, or a dataset.toml")
    if is_musubi(path):
        return read_musubi_dataset(path, folder, extraction.buckets.step, stride, encoding)
    if folder is None:
        raise UserError("a clips file or folder needs a folder for its cache; add --output DIR")
    source = read_source_clips(path, encoding, recursive, roi_units)
    return [CacheSet(folder, path, extraction, source.clips, source.drops, taxonomy=source.taxonomy,
                     notes=source.notes)]
