"""Settings of `lapwan cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lapwan.names import NEGATIVE_PROMPT
from lapwan.settings.base import Flag, Settings, height_width, text_encoding
from lapwan.settings.model import ModelChoice

_SHEETS = (".html", ".png")


class CacheSettings(Settings):
    """What to encode, with which model, into which folder."""

    dataset: Annotated[Path | None, Flag("-d", metavar="FILE|FOLDER")] = Field(
        None, description="clips.jsonl, labels.jsonl, a CSV, TSV or JSON list, a folder with a caption file beside "
        "each clip, or a musubi-tuner dataset.toml.")
    recursive: Annotated[bool, Flag()] = Field(False, description="Of a folder, read the sub-folders, too.")
    caption_encoding: Annotated[str, Flag(metavar="NAME")] = Field(
        "auto", description="Encoding of captions: auto (UTF-8, UTF-16 by its mark, GB18030 or Windows-1252 by what "
        "reads as text), or a name such as gb18030.")
    model: Annotated[ModelChoice | None, Flag("-m", metavar="MODEL")] = Field(
        None, description="Model whose VAE and text encoder are used: tiny, or a model folder; in TOML also the table "
                          "of a training, such as the files high, low, vae, text_encoder and tokenizer.")
    output: Annotated[Path | None, Flag("-o", metavar="DIR")] = Field(
        None, description="Cache folder; a dataset.toml may name its own.")
    size: Annotated[tuple[int, int] | None, Flag(metavar="HEIGHTxWIDTH")] = Field(
        None, description="Height x width in pixels, such as 480x832; default: the model's.")
    num_frames: Annotated[tuple[int, ...] | None, Flag(metavar="N[,N...]")] = Field(
        None, description="Frames per clip, 4N+1; several lengths as 17,33; default: the model's.")
    latents: Annotated[bool, Flag()] = Field(True, description="Encode the clips.")
    text: Annotated[bool, Flag()] = Field(True, description="Encode the captions.")
    i2v: Annotated[bool | None, Flag("--i2v/--t2v")] = Field(
        None, description="Encode the image-to-video condition or not; default: as the model needs.")
    last_image: Annotated[bool, Flag()] = Field(
        False, description="Put each clip's last frame into the image-to-video condition, too, as generate "
        "--last-image does.")
    frame_extraction: Annotated[Literal["head", "chunk", "slide", "uniform", "full"], Flag()] = Field(
        "head", description="How windows are taken from a clip: head, chunk, slide, uniform or full.")
    frame_stride: Annotated[int, Flag()] = Field(1, ge=1, description="For slide: frames between window starts.")
    frame_sample: Annotated[int, Flag()] = Field(1, ge=1, description="For uniform: number of windows.")
    max_frames: Annotated[int, Flag()] = Field(129, ge=1, description="For full: largest number of frames.")
    source_fps: Annotated[float | None, Flag()] = Field(
        None, ge=0.01, le=1000, description="Frame rate of the clips, instead of the one in the files.")
    deinterlace: Annotated[Literal["auto", "always", "never"], Flag()] = Field(
        "auto", description="Two fields to one frame (yadif): auto (files that say they are interlaced), always, "
        "never.")
    hdr: Annotated[Literal["refuse", "tonemap"], Flag()] = Field(
        "refuse", description="HDR videos (PQ, HLG): refuse them, or tonemap to BT.709 (BT.2390's curve).")
    background: Annotated[Literal["black", "white"], Flag()] = Field(
        "black", description="What shows through transparent pixels: black or white.")
    roi_units: Annotated[Literal["fractions", "pixels", "coco", "yolo"], Flag()] = Field(
        "fractions", description="Numbers of boxes in a JSONL: fractions or pixels (corners), coco or yolo.")
    buckets: Annotated[bool, Flag()] = Field(
        False, description="Choose the size by aspect ratio, near the area of --size, instead of cropping to --size.")
    bucket_no_upscale: Annotated[bool, Flag()] = Field(False, description="With --buckets: never enlarge a clip.")
    negative_prompt: Annotated[str, Flag()] = Field(
        NEGATIVE_PROMPT, description="Encoded besides the empty prompt, for guidance during training.")
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Flag()] = Field(
        "auto", description="Dtype in the files: float32, bfloat16, or auto (latents float32, text as encoded).")
    vae_dtype: Annotated[Literal["float32", "bfloat16"], Flag()] = Field(
        "float32", description="Compute dtype of the VAE: float32 (safest) or bfloat16 (faster on a GPU).")
    device: Annotated[str, Flag()] = Field("auto", description="auto, cpu, cuda or cuda:N.")
    workers: Annotated[int | None, Flag()] = Field(
        None, ge=0, description="Processes that decode clips; 0: decode in the main process; default: chosen by the "
        "amount of work.")
    batch_size: Annotated[int | None, Flag()] = Field(
        None, ge=1, description="Clips encoded at a time; default: chosen by their size.")
    prune: Annotated[bool, Flag()] = Field(
        False, description="Delete cache files of clips that are no longer in the dataset.")
    verify: Annotated[bool, Flag()] = Field(
        False, description="Read every cached file again and list the damaged ones; without --dataset do only that.")
    preview: Annotated[int | Path, Flag(metavar="FILE|N")] = Field(
        0, description="FILE.html or FILE.png: show the dataset before it is encoded (crops, items, regions, dropped "
        "clips), and encode nothing. N: decode N cached clips into lapwan_preview.png; without --dataset do only that.")
    duplicates: Annotated[bool, Flag()] = Field(
        False, description="List clips that look the same in the plan, too (decodes three frames of each); equal files "
        "are always listed.")
    skip_bad: Annotated[bool, Flag()] = Field(False, description="List bad clips, but do not fail.")

    _encoding = field_validator("caption_encoding")(text_encoding)
    _size = field_validator("size", mode="before")(height_width)

    @field_validator("preview", mode="before")
    @classmethod
    def _preview(cls, value: Any) -> Any:
        """A number of clips from 0 on, or a file that a sheet can be written to."""
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, str | Path) and Path(value).suffix.lower() in _SHEETS:
            return Path(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"must be a file ending in {' or '.join(_SHEETS)}, or a number of cached clips")
        return value

    @field_validator("num_frames", mode="before")
    @classmethod
    def _frames(cls, value: Any) -> Any:
        if isinstance(value, int):
            return (value,)
        if isinstance(value, str):
            parts = value.replace(",", " ").split()
            if not parts or not all(part.isdigit() for part in parts):
                raise ValueError("must be a number of frames such as 81, or several as 17,33")
            return tuple(int(part) for part in parts)
        return value

    @model_validator(mode="after")
    def _something(self) -> CacheSettings:
        if self.dataset is None and isinstance(self.preview, Path):
            raise ValueError("preview shows a dataset before it is encoded: --dataset FILE is required; a number shows "
                             "cached clips")
        if self.dataset is None and not (self.verify or self.preview):
            raise ValueError(
                "dataset is required (--dataset FILE or FOLDER), or --verify or --preview N of an existing cache"
            )
        if self.dataset is not None and self.model is None:
            raise ValueError("model is required: --model tiny, or a model folder")
        if self.last_image and self.i2v is False:
            raise ValueError("last_image is part of the image-to-video condition, which --t2v leaves out")
        if not self.latents and not self.text:
            raise ValueError("--no-latents with --no-text leaves nothing to do")
        return self
