"""A generated video: frames, settings and facts, saved with them as metadata, and repeated from that metadata.

`Video.save` writes settings (what the command line names) and facts (fingerprints, gates, versions). For `--from`,
`recorded_settings` reads them back and `compare_with_record` reports whether the frames are the same.
"""

from __future__ import annotations

import base64
import json
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lapwan import __version__, console
from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.tensors import save_tensors
from lapwan.documents import checked, parse_json
from lapwan.errors import UserError
from lapwan.files import atomic_file, claim_output
from lapwan.sampling.video import DEFAULT_CRF, check_video_path, read_video_metadata, write_video
from lapwan.settings.aliases import current_keys
from lapwan.settings.base import to_toml
from lapwan.settings.generate import GenerateSettings, ModelSettings, VideoSettings
from lapwan.settings.load import load

LATENTS_SUFFIX = ".safetensors"
_FINGERPRINT = 64  # hex digits


@dataclass(frozen=True, repr=False)
class Video:
    """A video and its origin.

    Args:
        frames: uint8 RGB [T, H, W, 3].
        latents: normalised [1, C, T, H, W] on the CPU.
        settings: as the command line names them, enough to generate the video again.
        facts: fingerprints of model, adapters and images, the gates of the mixture, versions.
    """

    frames: np.ndarray
    fps: int
    latents: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        return f"Video({count} frames of {height}x{width} at {self.fps} fps, seed {self.settings.get('seed')})"

    def _repr_html_(self) -> str:
        """In a notebook: the video itself, which plays in a loop; of one frame a picture."""
        with tempfile.TemporaryDirectory() as folder:
            one = len(self.frames) == 1
            file = self.save(Path(folder) / ("frame.png" if one else "video.mp4"))
            data = base64.b64encode(file.read_bytes()).decode("ascii")
        if one:
            return f'<img src="data:image/png;base64,{data}">'
        return f'<video controls loop autoplay muted src="data:video/mp4;base64,{data}"></video>'

    def metadata(self) -> dict[str, str]:
        """The metadata of the file: version, settings and facts, as JSON strings."""
        return {
            "lapwan": __version__,
            "settings": json.dumps(self.settings, ensure_ascii=False),
            "facts": json.dumps(self.facts, ensure_ascii=False),
        }

    def save(self, path: str | Path, overwrite: bool = False, crf: int | None = None) -> Path:
        """Write `.mp4`, `.gif`, `.webp`, `.png` (one frame), a folder of frames, or the latents as `.safetensors`.

        The write is atomic. Returns the absolute path.

        Args:
            path: the file, or the folder of frames (a name without a suffix).
            overwrite: replace an existing output.
            crf: H.264 quality, 0 (best) to 51; None is 18.

        Raises:
            UserError: the output exists and `overwrite` is False, an unknown suffix, or a full disk.
        """
        target = Path(path).expanduser().absolute()
        claim_output(target, overwrite)
        try:
            if target.suffix == LATENTS_SUFFIX:
                with atomic_file(target) as temporary:
                    save_tensors({"latents": self.latents}, temporary, metadata=self.metadata())
            else:
                write_video(target, self.frames, self.fps, self.metadata(), DEFAULT_CRF if crf is None else crf)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error}") from None
        return target


def record_of(model: ModelSettings, video: VideoSettings) -> dict[str, Any]:
    """The settings that a video's file keeps, in the types of TOML.

    Args:
        model: of the model and its adapters; `memory` is left out.
        video: of the video, as `completed` returns them.
    """
    record = _plain(model)
    del record["memory"]  # offloading does not change the frames: a repetition on another machine chooses again
    return {**record, **_plain(video)}


def _plain(settings: ModelSettings | VideoSettings) -> dict[str, Any]:
    """In the types of TOML: absolute paths, None left out."""
    plain = tomllib.loads(to_toml(settings))
    for holder in (plain, plain.get("model")):
        if isinstance(holder, dict) and isinstance(name := holder.get("model"), str) and Path(name).is_dir():
            holder["model"] = str(Path(name).absolute())
    return plain


def check_output(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Check, before any work, that a video of `frames` frames of `size` (H, W) can be saved to a path.

    Args:
        path: the file or folder to write.
        frames: their number.
        size: height and width in pixels.

    Raises:
        UserError: an unknown suffix, or frames or a size that its format cannot hold.
    """
    if path.suffix != LATENTS_SUFFIX:
        check_video_path(path, frames, size)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that `Video.save` wrote to a file; {} if another program wrote it.

    Raises:
        UserError: missing, or neither a video, an image nor safetensors.
    """
    if path.suffix == LATENTS_SUFFIX:
        return read_header(path).metadata
    return read_video_metadata(path)


@dataclass(frozen=True)
class RecordedVideo:
    """The facts of a video to repeat; `overridden`: options that were given besides `--from` and change the frames."""

    path: Path
    facts: Mapping[str, Any]
    overridden: tuple[str, ...]


_NO_CONTENT = ("from_video", "output", "sheet", "preview", "crf", "memory")  # options that leave the frames as they are


def recorded_settings(path: Path, settings: GenerateSettings) -> tuple[RecordedVideo, GenerateSettings]:
    """The record of a video, and its settings overridden by those given now.

    Args:
        path: a video, image or .safetensors of latents that lapwan wrote.
        settings: those given now, which override the record's.

    Raises:
        UserError: no such video, or one that lapwan did not make.
        UserError: settings that this version does not accept.
    """
    metadata = read_metadata(path)
    if "settings" not in metadata or "facts" not in metadata:
        raise UserError(f"{path} holds no settings of lapwan generate, so it cannot be repeated with --from")
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    if "prompts" in given:
        raise UserError("--from repeats one video; leave --prompts out")
    record = {key: checked(parse_json(metadata[key], f"{path}, {key}", non_finite=True), dict[str, Any],
                           f"{path}, {key}") for key in ("settings", "facts")}
    # Of the record only what makes the frames: where the video goes is said on the command line.
    known = {*VideoSettings.model_fields, *ModelSettings.model_fields} - set(_NO_CONTENT)
    if foreign := sorted(set(current_keys(record["settings"])) - known):
        raise UserError(f"{path} holds settings that this version does not accept: unknown key '{foreign[0]}'")
    try:
        merged = load(GenerateSettings, options={**record["settings"], **given}, environment={})
    except UserError as error:
        raise error.within(f"{path} holds settings that this version does not accept") from None
    overridden = tuple(name for name in given if name not in _NO_CONTENT)
    return RecordedVideo(path, record["facts"], overridden), merged


def compare_with_record(record: RecordedVideo, video: Video) -> None:
    """Log whether the frames are those of the record; if not, warn of each fact that differs.

    Args:
        record: of the video that was repeated.
        video: the repetition.
    """
    if record.facts.get("frames") == video.facts.get("frames"):
        console.log(f"the frames are identical to those of {record.path}")
        return
    changes = list(_changes(record.facts, video.facts))
    for change in changes:
        console.warn(f"{change} since {record.path} was made")
    if record.overridden:
        console.log(f"the frames differ from {record.path}; options given: {', '.join(sorted(record.overridden))}")
    elif not changes:
        console.warn(f"the frames differ from {record.path} although nothing recorded has changed; another machine or "
                     "number of threads may round differently")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    messages = {
        "model": "the transformers have changed", "vae": "the VAE has changed",
        "text_encoder": "the text encoder has changed", "lora": "the LoRAs have changed",
        "image": "the image has changed", "last_image": "the last image has changed",
        "video": "the video to start from has changed",
        "mixture": "the mixture has changed", "device": "the device has changed", "hardware": "the machine has changed",
        "dtype": "the precision has changed", "precision": "the quantisation has changed",
        "text_precision": "the text encoder's quantisation has changed",
        "compiled": "what is compiled has changed", "guidance": "the batching of guidance has changed",
        "processes": "the number of processes has changed",
        "batch": "the number of videos in a batch has changed",
    }
    for key, text in messages.items():
        absent = key in ("hardware", "compiled", "guidance") and key not in before  # written by an older version
        if before.get(key) != now.get(key) and not absent:
            yield f"{text} ({_difference(before.get(key), now.get(key))})"
    versions = before.get("versions", {})
    for name, version in dict(now.get("versions", {})).items():
        old = versions.get(name) if isinstance(versions, Mapping) else None
        if old != version:
            yield f"{name} has changed ({old} -> {version})"


def _difference(before: Any, now: Any) -> str:
    """Only what differs: keys of a mapping, items of a list."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
        return ", ".join(f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}" for key in keys)
    if isinstance(before, list) and isinstance(now, list):
        before, now = [item for item in before if item not in now], [item for item in now if item not in before]
    return f"{_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_short(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return " ".join(_short(item) for item in value.values())
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == _FINGERPRINT and set(text) <= set("0123456789abcdef") else text
