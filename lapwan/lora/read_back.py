"""Proof of a written adapter file: every ΔW is read back and compared with the one that was to be written.

    error = ‖ΔW_file − ΔW‖_F / ‖ΔW‖_F

The difference of two low-rank pairs is itself one, [s B, −s' B'] [A; A'], so its norm needs no ΔW. What rounding can
explain, to first order, is |s| Σ_i δ_i Π_{j≠i} ‖F_j‖ over the factors F of a product, δ_i = ½ eps ‖F_i‖ plus half the
smallest number of the dtype for each element; twice that is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lapwan.checkpoints.rewrite import matrix_shape
from lapwan.console import log
from lapwan.errors import UserError
from lapwan.lora.formats import open_lora
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate
from lapwan.names import NoiseExpert

_TILE = 1 << 20  # elements of ΔW at a time, in fp64
_SLACK = 1e-12  # of the fp64 arithmetic, over the product of the norms


@dataclass(frozen=True)
class ReadBack:
    """How many modules were compared, the largest relative error of one, and its path (empty if all are equal)."""

    modules: int
    error: float
    path: str


def reader(path: Path, states: Mapping[NoiseExpert | None, AdapterState]) -> Callable[[Path], None]:
    """A `check` for `formats.write_lora`: compares the file with `states` and logs one line under the name `path`."""
    def check(written: Path) -> None:
        result = compare_written(written, states, path)
        worst = f", largest relative error of ΔW {result.error:.2g} in {result.path}" if result.path else ", ΔW exact"
        log(f"read back {path.name}: {result.modules} of {result.modules} modules{worst}")

    return check


def compare_written(written: Path, states: Mapping[NoiseExpert | None, AdapterState], path: Path) -> ReadBack:
    """Compare a written file with what was to be written.

    Args:
        written: the file.
        states: adapters by noise expert; one alone is compared with the file's only one.
        path: the file's name in messages.

    Raises:
        UserError: a module that is missing or added, or a ΔW that differs by more than rounding.
    """
    files = open_lora(written)
    worst, modules = (0.0, ""), 0
    for noise_expert, state in states.items():
        file = files.get(noise_expert) if len(states) > 1 else next(iter(files.values()))
        paths = set() if file is None else set(file.modules)
        for module in sorted(paths ^ set(state.entries)):
            raise _mismatch(path, module)
        for module, wanted in state.entries.items():
            error = relative_error(wanted, file.modules[module].entry()) if file is not None else 0.0
            if error is None:
                raise _mismatch(path, module)
            worst, modules = max(worst, (error, module if error else "")), modules + 1
    return ReadBack(modules, *worst)


def _mismatch(path: Path, module: str) -> UserError:
    return UserError(f"{path}: module '{module}' is not what was written when read back; the file is not kept: check "
                     "the disk and the memory, then run the command again")


def relative_error(wanted: WeightUpdate, written: WeightUpdate) -> float | None:
    """‖ΔW_written − ΔW‖ / ‖ΔW‖; None if rounding does not explain it."""
    if _identical(wanted, written):
        return 0.0
    if wanted.needs_weight or written.needs_weight:
        return _factors_error(wanted, written)
    if matrix_shape(wanted.shape) != matrix_shape(written.shape):
        return None
    distance, length = _norms(wanted, written)
    tensors = list(written.parts().values())
    return _judged(distance, length, _rounding(tensors, written.scale))


def _judged(distance: float, length: float, bound: float) -> float | None:
    if not distance <= bound:
        return None
    return distance / length if length > 0 else float(distance > 0)


def _identical(a: WeightUpdate, b: WeightUpdate) -> bool:
    first, second = a.parts(), b.parts()
    return (type(a) is type(b) and a.scale == b.scale and first.keys() == second.keys()
            and all(t.shape == second[part].shape and torch.equal(t.double(), second[part].double())
                    for part, t in first.items()))


def _factors_error(wanted: WeightUpdate, written: WeightUpdate) -> float | None:
    """Of a ΔW that depends on W: the largest error of a factor, with the scales folded into them."""
    first, second = (update.map(Tensor.double).folded(torch.float64).parts() for update in (wanted, written))
    if first.keys() != second.keys() or any(first[part].shape != second[part].shape for part in first):
        return None
    stored = written.parts()
    worst = 0.0
    for part, tensor in first.items():
        eps = torch.finfo(stored[part].dtype).eps
        length = torch.linalg.vector_norm(tensor).item()
        tiny = torch.finfo(stored[part].dtype).smallest_normal * eps * math.sqrt(tensor.numel())
        bound = 2 * (max(eps, torch.finfo(torch.float32).eps) * length + tiny)
        error = _judged(torch.linalg.vector_norm(second[part] - tensor).item(), length, bound)
        if error is None:
            return None
        worst = max(worst, error)
    return worst


def _norms(wanted: WeightUpdate, written: WeightUpdate) -> tuple[float, float]:
    """(‖ΔW_written − ΔW‖, ‖ΔW‖) in fp64, without a whole ΔW."""
    if isinstance(wanted, LowRank) and isinstance(written, LowRank):
        downs, ups = zip(*((u.down.flatten(1).double(), u.up.flatten(1).double() * u.scale) for u in (wanted, written)),
                         strict=True)
        difference = _pair_norm(torch.cat(downs), torch.cat((-ups[0], ups[1]), dim=1))
        return difference, _pair_norm(downs[0], ups[0])
    rows, columns = matrix_shape(wanted.shape)
    add, subtract = written.prepare(1.0, torch.float64), wanted.prepare(-1.0, torch.float64)
    step, difference, square = max(1, _TILE // columns), 0.0, 0.0
    for first in range(0, rows, step):
        tile = torch.zeros(min(step, rows - first), columns, dtype=torch.float64)
        subtract(tile, tile, first)
        square += tile.square().sum().item()
        add(tile, tile, first)
        difference += tile.square().sum().item()
    return math.sqrt(difference), math.sqrt(square)


def _pair_norm(down: Tensor, up: Tensor) -> float:
    """‖B A‖ = ‖R_B R_Aᵀ‖ of the QR decompositions of the thin factors."""
    return torch.linalg.matrix_norm(torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T).item()


def _rounding(factors: Sequence[Tensor], scale: float) -> float:
    """The largest ‖ΔW_file − ΔW‖ that rounding the factors to their dtypes explains (see the module)."""
    norms = [torch.linalg.vector_norm(factor.double()).item() for factor in factors]
    total = 0.0
    for i, factor in enumerate(factors):
        info = torch.finfo(factor.dtype)
        # A scale is folded in fp32 before the rounding to a wider dtype.
        eps = max(info.eps, torch.finfo(torch.float32).eps)
        error = 0.5 * (eps * norms[i] + info.smallest_normal * info.eps * math.sqrt(factor.numel()))
        total += error * math.prod(norms[:i] + norms[i + 1:])
    return abs(scale) * (2 * total + _SLACK * math.prod(norms))
