"""An adapter's file, not read yet: its modules, what it is for, and what of it was left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lapwan.checkpoints.container import TensorFile
from lapwan.checkpoints.rewrite import AddRows, BaseRows, matrix_shape
from lapwan.checkpoints.tensors import all_finite, load_rows, load_tensor
from lapwan.lora.checks import RETRAIN, check_finite, not_finite
from lapwan.lora.kinds import FullDelta, build_update
from lapwan.lora.noise_expert import of_one_transformer
from lapwan.lora.state import AdapterState, WeightUpdate, entries_fingerprint, low_rank_only
from lapwan.names import NoiseExpert

ZEROS = "all zero"
_WIDTHS = {5120: "A14B or Wan2.1 14B", 3072: "TI2V-5B", 1536: "Wan2.1 1.3B"}  # model by the width of its blocks
# Modules of a block whose weight has the block's width, and in which dimension.
_WIDTH_DIMENSION = {"to_q": 1, "to_k": 1, "to_v": 1, "to_out.0": 1, "ffn.net.0.proj": 1, "ffn.net.2": 0}
_ZERO_TILE = 1 << 20  # numbers compared with zero at a time


@dataclass(frozen=True)
class AdapterModule:
    """One update in a file, not read yet: the names of its tensors by part, and `outline`, the same update of tensors
    without data. `alpha` is a tensor's name, a number, or None for scale 1; `factor` multiplies the first tensor."""

    file: TensorFile
    path: str
    names: Mapping[str, str]
    alpha: str | float | None
    outline: WeightUpdate = field(compare=False)  # follows from the others, and tensors have no one truth value
    factor: float = 1.0

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.outline.kind

    @property
    def rank(self) -> int | None:
        """r of its low-rank factors; None where it has none."""
        return self.outline.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that it changes."""
        return self.outline.shape

    @property
    def stackable(self) -> bool:
        """A low-rank pair of a Linear."""
        return self.outline.stackable

    @property
    def needs_weight(self) -> bool:
        """ΔW depends on W."""
        return self.outline.needs_weight

    def entry(self) -> WeightUpdate:
        """Read the tensors."""
        alpha = float(load_tensor(self.file, self.alpha).item()) if isinstance(self.alpha, str) else self.alpha
        parts = {part: _widened(load_tensor(self.file, name)) for part, name in self.names.items()}
        if self.factor != 1.0:
            first = next(iter(parts))
            parts[first] = parts[first].double().mul_(self.factor).float()
        return build_update(parts, alpha)

    def checked_entry(self, remedy: str = RETRAIN) -> WeightUpdate:
        """As `entry`, for use.

        Args:
            remedy: the end of the message.

        Raises:
            UserError: a NaN or an infinity; names its module and tensor.
        """
        entry = self.entry()
        alpha = {"alpha": self.alpha} if isinstance(self.alpha, str) else {}
        check_finite(self.path, entry, self.file.path, {**self.names, **alpha}, remedy)
        return entry

    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        """As `WeightUpdate.prepare`; a full delta is read tile by tile, since it is as large as the weight.

        Args:
            multiplier: of ΔW.
            dtype: of the computation.
            base_rows: reads rows of W; needed where ΔW depends on all of W at once.

        Raises:
            UserError: a NaN or an infinity; of a full delta when its rows are added.
        """
        if not isinstance(self.outline, FullDelta):
            return self.checked_entry().prepare(multiplier, dtype, base_rows)
        name, factor = self.names["diff"], multiplier * self.factor

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            rows = load_rows(self.file, name, first, len(work))
            if not all_finite(rows):
                raise not_finite(self.path, "difference of the full delta", self.file.path, name)
            work.add_(rows.to(dtype) * factor)

        return add_rows

    def is_zero(self) -> bool:
        """Whether it is a full delta of zeros; reads as far as the first other number."""
        if not isinstance(self.outline, FullDelta):
            return False
        rows, columns = matrix_shape(self.shape)
        step = max(1, _ZERO_TILE // max(1, columns))
        return not any(bool(load_rows(self.file, self.names["diff"], first, min(step, rows - first)).float().any())
                       for first in range(0, rows, step))


def _widened(tensor: Tensor) -> Tensor:
    """An 8-bit tensor in bfloat16, which holds it exactly: torch does no arithmetic in 8 bits."""
    return tensor.bfloat16() if tensor.dtype.itemsize == 1 else tensor


@dataclass(frozen=True)
class AdapterFile:
    """The adapter of one noise expert in a file, not read yet: modules by path as in `AdapterState`, and the metadata.

    `noise_expert_source` is what the noise expert was read from: "metadata", "keys", "name" or "" (not known).
    `dropped` counts the tensors that were not read, by reason; `wrappers` are unusual ones that were stripped.
    """

    path: Path
    noise_expert: NoiseExpert | None
    noise_expert_source: str
    modules: dict[str, AdapterModule]
    metadata: dict[str, str]
    dropped: dict[str, int] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()

    def without_zeros(self) -> AdapterFile:
        """Without full deltas of zeros; they are counted as dropped."""
        zeros = [path for path, module in self.modules.items() if module.is_zero()]
        if not zeros or len(zeros) == len(self.modules):
            return self
        modules = {path: module for path, module in self.modules.items() if path not in zeros}
        return replace(self, modules=modules, dropped={**self.dropped, ZEROS: len(zeros)})

    def fits(self) -> str:
        """The model that it is for, by the width of its blocks: `A14B (width 5120)`; empty if none tells."""
        for path, module in self.modules.items():
            dimension = next((n for name, n in _WIDTH_DIMENSION.items() if path.endswith(f".{name}")), None)
            if path.startswith("blocks.") and dimension is not None and len(module.shape) == 2:
                width = module.shape[dimension]
                return f"{_WIDTHS[width]} (width {width})" if width in _WIDTHS else f"width {width}"
        return ""

    def other_model(self) -> str:
        """The end of a message about modules that do not fit."""
        blocks = {path.split(".")[1] for path in self.modules if path.startswith("blocks.")}
        last = f", blocks up to {max(map(int, blocks))}" if blocks else ""
        fits = self.fits()
        return f"the LoRA was made for another model{f': {fits}{last}' if fits else ''}"

    @property
    def loses(self) -> bool:
        """Whether something was dropped that is not zero."""
        return any(reason != ZEROS for reason in self.dropped)

    def report(self) -> str:
        """One line: what is applied, what is dropped and why, for which noise expert and model."""
        counts = Counter(module.kind for module in self.modules.values())
        name = self.path.name if self.path.stem != "adapter_model" else f"{self.path.parent.name}/{self.path.name}"
        line = f"{name}: " + ", ".join(f"{count} x {kind}" for kind, count in counts.items())
        unknown = "" if of_one_transformer(self.metadata) else ", noise expert not recorded"
        line += f", {self.noise_expert.value} noise" if self.noise_expert else unknown
        if fits := self.fits():
            line += f", for {fits}"
        if self.wrappers:
            line += f"; wrapper {', '.join(map(repr, self.wrappers))} stripped"
        dropped = ", ".join(f"{count} of {reason}" if reason != ZEROS else f"{count} all-zero full deltas"
                            for reason, count in self.dropped.items())
        return f"{line}; dropped {dropped}" if dropped else line

    def fingerprint(self) -> str:
        """As `AdapterState.fingerprint`, with one module in memory at a time."""
        return entries_fingerprint((path, self.modules[path].entry()) for path in sorted(self.modules))

    def read(self) -> AdapterState:
        """Read every module."""
        return AdapterState({path: module.entry() for path, module in self.modules.items()}, dict(self.metadata))

    def finite_fingerprint(self) -> str:
        """As `fingerprint`, of values that are to be used.

        Raises:
            UserError: a NaN or an infinity.
        """
        return entries_fingerprint((path, self.modules[path].checked_entry()) for path in sorted(self.modules))

    def read_finite(self, remedy: str = RETRAIN) -> AdapterState:
        """As `read`, for use.

        Args:
            remedy: the end of the message.

        Raises:
            UserError: a NaN or an infinity; names its module and tensor.
        """
        entries = {path: module.checked_entry(remedy) for path, module in self.modules.items()}
        return AdapterState(entries, dict(self.metadata))

    def check_finite(self) -> None:
        """Look for NaN and infinity before the work, except in full deltas as large as a weight: those are checked
        tile by tile while they are merged.

        Raises:
            UserError: a NaN or an infinity.
        """
        for module in self.modules.values():
            if not isinstance(module.outline, FullDelta) or math.prod(module.shape) <= _ZERO_TILE:
                module.checked_entry()

    def outline(self) -> AdapterState:
        """Its updates with tensors without data, of which all alphas are left out."""
        return AdapterState({path: module.outline for path, module in self.modules.items()}, dict(self.metadata))

    def ranks(self, purpose: str) -> dict[str, int]:
        """Rank by module of a plain LoRA.

        Raises:
            UserError: it holds another kind of update; `purpose` says what cannot use that (see `low_rank_only`).
        """
        low_rank_only(self.modules, purpose)
        return {path: module.rank for path, module in self.modules.items() if module.rank is not None}
