"""A generated video: its frames, and what made it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lapwan import __version__, console
from lapwan.checkpoints.container import read_header
from lapwan.errors import UserError
from lapwan.files import atomic_file, claim_output
from lapwan.sampling.video import DEFAULT_CRF, check_video_path, read_video_metadata, write_video
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.load import load

LATENTS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Video:
    """`frames` uint8 RGB [T, H, W, 3]; `latents` normalised [1, C, T, H, W] on the CPU.

    `settings` as the command line names them, enough to make it again; `facts`: fingerprints of model, adapters and
    image, the chosen gates, versions.
    """

    frames: np.ndarray
    fps: int
    latents: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """What is stored in the file: settings and facts as JSON."""
        return {
            "lapwan": __version__,
            "settings": json.dumps(self.settings, ensure_ascii=False),
            "facts": json.dumps(self.facts, ensure_ascii=False),
        }

    def save(self, path: str | Path, overwrite: bool = False, crf: int | None = None) -> Path:
        """Write `.mp4`, `.gif`, `.webp`, `.png` (one frame), a folder of frames, or the latents as `.safetensors`,
        atomically; the path, absolute.

        Args:
            crf: H.264 quality, 0 (best) to 51; None is 18.

        Raises:
            UserError: the output exists and `overwrite` is False, a path that is not written, or a full disk.
        """
        target = Path(path).expanduser().absolute()
        claim_output(target, overwrite)
        try:
            if target.suffix == LATENTS_SUFFIX:
                with atomic_file(target) as temporary:
                    save_file({"latents": self.latents}, temporary, metadata=self.metadata())
            else:
                write_video(target, self.frames, self.fps, self.metadata(), DEFAULT_CRF if crf is None else crf)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {target}: {error}") from None
        return target


def check_output(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Refuse, before any work, a path that a video of `frames` frames of `size` (H, W) could not be saved to."""
    if path.suffix != LATENTS_SUFFIX:
        check_video_path(path, frames, size)


def read_metadata(path: Path) -> dict[str, str]:
    """What `Video.save` stored in a file; {} if it is somebody else's.

    Raises:
        UserError: missing, or neither a video, an image nor safetensors.
    """
    if path.suffix == LATENTS_SUFFIX:
        return read_header(path).metadata
    return read_video_metadata(path)

@dataclass(frozen=True)
class Record:
    """What a video carries: where, its facts, and whether other options were given along with it."""

    path: Path
    facts: Mapping[str, Any]
    overridden: tuple[str, ...]


_HASH = 64  # hex digits of a fingerprint
_NO_CONTENT = ("from_video", "output", "sheet", "preview", "crf", "memory")  # options that leave the frames as they are


def stored(path: Path, settings: GenerateSettings) -> tuple[Record, GenerateSettings]:
    """The video's record, and its settings under those given now.

    Raises:
        UserError: no such video, or none that lapwan made.
    """
    metadata = read_metadata(path)
    if "settings" not in metadata or "facts" not in metadata:
        raise UserError(f"{path} carries no settings of lapwan generate; it cannot be repeated from itself")
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    if "prompts" in given:
        raise UserError("--from repeats one video; leave --prompts out")
    try:
        merged = load(GenerateSettings, options={**json.loads(metadata["settings"]), **given}, environment={})
    except UserError as error:
        raise UserError(f"{path} carries settings that this version does not take: {error}") from None
    overridden = tuple(name for name in given if name not in _NO_CONTENT)
    return Record(path, json.loads(metadata["facts"]), overridden), merged


def compare(record: Record, video: Video) -> None:
    """Say whether the frames are those of the record; if not, what differs: warnings, one for each fact."""
    if record.facts.get("frames") == video.facts.get("frames"):
        console.log(f"the frames are identical to those of {record.path}")
        return
    changes = list(_changes(record.facts, video.facts))
    for change in changes:
        console.warn(f"{change} since {record.path} was made")
    if record.overridden:
        console.log(f"the frames differ from {record.path}; options given: {', '.join(sorted(record.overridden))}")
    elif not changes:
        console.warn(f"the frames differ from {record.path} although nothing recorded has changed: another machine or "
                     "number of threads rounds otherwise")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    said = {
        "model": "the transformers have changed", "vae": "the VAE has changed",
        "text_encoder": "the text encoder has changed", "lora": "the LoRAs have changed",
        "image": "the image has changed", "last_image": "the last image has changed",
        "video": "the video to start from has changed",
        "mixture": "the mixture has changed", "device": "the device is another", "hardware": "the machine is another",
        "dtype": "the precision is another", "precision": "the quantisation is another",
        "text_precision": "the text encoder's quantisation is another",
        "compiled": "what is compiled is another", "guidance": "guidance's batch is another",
        "processes": "the number of processes is another",
    }
    for key, text in said.items():
        unknown = key in ("hardware", "compiled", "guidance") and key not in before  # an older record
        if before.get(key) != now.get(key) and not unknown:
            yield f"{text} ({_difference(before.get(key), now.get(key))})"
    for name, version in dict(now.get("versions", {})).items():
        old = before.get("versions", {}).get(name)
        if old != version:
            yield f"{name} has changed ({old} -> {version})"


def _difference(before: Any, now: Any) -> str:
    """Only what differs: keys of a mapping, items of a list."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
        return ", ".join(f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}" for key in keys)
    if isinstance(before, list) and isinstance(now, list):
        before, now = [one for one in before if one not in now], [one for one in now if one not in before]
    return f"{_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_short(one) for one in value) or "none"
    if isinstance(value, Mapping):
        return " ".join(_short(one) for one in value.values())
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == _HASH and set(text) <= set("0123456789abcdef") else text
