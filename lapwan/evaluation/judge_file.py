"""The file of a judge: its network, what it can name, how it was calibrated, and its figures on clips held out.

Tensors: the network's, in bf16. Metadata: `lapwan.format = judge/1`, `lapwan.judge` (JSON: `JudgeMetadata`). A judge is
known by the sha256 of its tensors and metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lapwan import files
from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.tensors import load_tensor, save_tensors
from lapwan.documents import checked, parse_json
from lapwan.errors import UserError
from lapwan.evaluation.judge_net import STRIDE, Canvas, JudgeNet, Temperatures
from lapwan.lora.metadata import FORMAT_KEY

FORMAT = "judge/1"
_KEY = "lapwan.judge"
LEAST_IDENTITY = 0.9  # on its own reconstructions: below, `evaluate` refuses a judge

TipKind = Literal["points", "boxes", "none"]
_Side = Annotated[int, Field(strict=True, ge=STRIDE, le=4096, multiple_of=STRIDE)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class JudgeMetadata(BaseModel):
    """`lapwan.judge` of a file.

    Attributes:
        families: keys of the taxonomy, in the order of the outputs.
        names: the families' names for people.
        taxonomy: its name.
        taxonomy_fingerprint: as `Taxonomy.fingerprint`; "" for instruments that are no taxonomy's families.
        canvas: height, width in pixels.
        tip: what the heat maps were trained on: points, middles of boxes, or nothing.
        temperatures: of the states' and of the families' logits.
        figures: of clips held out from training, as `judge_figures` makes them.
        recipe: what it was trained on and how.
    """

    model_config = ConfigDict(extra="ignore")

    families: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(min_length=1, max_length=256)]
    names: list[str]
    taxonomy: str
    taxonomy_fingerprint: str = ""
    canvas: tuple[_Side, _Side]
    tip: TipKind = "none"
    temperatures: tuple[_Positive, _Positive] = (1.0, 1.0)
    figures: dict[str, Any] = {}
    recipe: dict[str, Any] = {}


@dataclass(frozen=True)
class JudgeFile:
    """A judge as it is read from its file."""

    net: JudgeNet
    metadata: JudgeMetadata
    fingerprint: str

    @property
    def canvas(self) -> Canvas:
        """What its network reads."""
        return Canvas(*self.metadata.canvas)

    @property
    def temperatures(self) -> Temperatures:
        """Of its calibration."""
        return Temperatures(*self.metadata.temperatures)


def is_judge(metadata: Mapping[str, str] | None) -> bool:
    """True if a safetensors file with this metadata is a judge."""
    return bool(metadata) and (metadata or {}).get(FORMAT_KEY, "").startswith("judge/")


def rounded(net: JudgeNet) -> JudgeNet:
    """A copy with the weights that its file will hold: rounded to bf16; figures are of those."""
    copy = JudgeNet(net.families)
    copy.load_state_dict({name: value.detach().cpu().bfloat16().float() for name, value in net.state_dict().items()})
    return copy.requires_grad_(False).eval().to(next(net.parameters()).device)


def write_judge(path: Path, net: JudgeNet, metadata: JudgeMetadata) -> None:
    """Write a judge atomically.

    Args:
        path: the .safetensors file to write.
        net: trained.
        metadata: what the file says of it; NaN is stored as null.
    """
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in net.state_dict().items()}
    text = json.dumps(_without_nan(metadata.model_dump(mode="json")), ensure_ascii=False)
    with files.atomic_file(path) as temporary:
        save_tensors(tensors, temporary, metadata={FORMAT_KEY: FORMAT, _KEY: text})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_judge(path: Path) -> JudgeFile:
    """Read a judge, its network frozen on the CPU in fp32.

    Raises:
        UserError: missing, not a judge, of another format version, damaged or edited.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the .safetensors that train-judge wrote")
    if not path.exists():
        raise UserError(f"no such file: {path}; a judge is the .safetensors that train-judge wrote")
    file = read_header(path)
    if not is_judge(file.metadata):
        raise UserError(f"{path} is not a judge; make one with lapwan train-judge --cache DIR -o judge.safetensors")
    if file.metadata[FORMAT_KEY] != FORMAT:
        raise UserError(f"{path} has format {file.metadata[FORMAT_KEY]}; this version reads {FORMAT}: update lapwan")
    source = f"{path}, metadata {_KEY}"
    if _KEY not in file.metadata:
        raise UserError(f"{source}: it is missing; the file is damaged or was edited")
    metadata = checked(parse_json(file.metadata[_KEY], source), JudgeMetadata, source)
    if len(set(metadata.families)) < len(metadata.families) or len(metadata.names) != len(metadata.families):
        raise UserError(f"{source}: families and names must be as many, each family once; the file was edited")
    net = JudgeNet(len(metadata.families))
    digest = hashlib.sha256(file.metadata[_KEY].encode())
    state: dict[str, Tensor] = {}
    for name, target in net.state_dict().items():
        if name not in file.tensors or file.tensors[name].shape != tuple(target.shape):
            raise UserError(f"{path}: tensor '{name}' is missing or has another shape than {list(target.shape)}; the "
                            "file is damaged or was edited")
        value = load_tensor(file, name)
        if not bool(torch.isfinite(value.float()).all()):
            raise UserError(f"{path}: tensor '{name}' is not finite; the file is damaged")
        digest.update(name.encode() + bytes(file.read(name)))
        state[name] = value.float()
    net.load_state_dict(state)
    return JudgeFile(net.requires_grad_(False).eval(), metadata, digest.hexdigest()[:32])


def failed_ceiling(metadata: JudgeMetadata, least: float) -> str | None:
    """Why a judge must not judge: it names the instrument of too few of its own reconstructions; None if it may.

    Args:
        metadata: of its file.
        least: share of the held-out reconstructions that it must name, 0..1.
    """
    share = metadata.figures.get("identity_reconstructed")
    count = metadata.figures.get("videos_reconstructed")
    if isinstance(share, int | float) and share >= least:
        return None
    if not isinstance(share, int | float):
        return "its file has no figure of the VAE's reconstructions, the ceiling of every generated video"
    return (f"it names the instruments of {100 * share:.0f} % of {count} of the VAE's reconstructions that it did not "
            f"train on; {100 * least:.0f} % are needed, because no generated video can be judged better")
