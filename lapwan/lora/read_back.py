"""Proof of a written adapter file: every update is read back and compared with the one that was to be written.

    printed    ‖ΔW_file − ΔW‖_F / ‖ΔW‖_F, in fp64
    refused    a factor of which an element differs by more than the rounding to the file's dtype, the scale folded in

The difference of two low-rank pairs is itself one, [s B, −s' B'] [A; A'], so its norm needs no ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class ReadBack:
    """How many modules were compared, the largest relative error of one, and its path (empty if all are equal)."""

    modules: int
    error: float
    path: str


def reader(
    path: Path, states: Mapping[NoiseExpert, AdapterState] | Mapping[NoiseExpert | None, AdapterState]
) -> Callable[[Path], None]:
    """A `check` for `formats.write_lora`: compares the file with `states` and logs one line under the name `path`.

    Args:
        path: the file's name in messages.
        states: as in `compare_written`.
    """
    def check(written: Path) -> None:
        result = compare_written(written, states, path)
        worst = f", largest relative error of ΔW {result.error:.2g} in {result.path}" if result.path else ", ΔW exact"
        log(f"read back {path.name}: {result.modules} of {result.modules} modules{worst}")

    return check


def compare_written(
    written: Path, states: Mapping[NoiseExpert, AdapterState] | Mapping[NoiseExpert | None, AdapterState], path: Path
) -> ReadBack:
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
    """‖ΔW_written − ΔW‖ / ‖ΔW‖ (of a ΔW that depends on W: the largest such ratio of a factor); None if a factor
    differs by more than rounding.

    Args:
        wanted: the update in memory.
        written: the update read from the file.
    """
    if _identical(wanted, written):
        return 0.0
    first, second = (update.map(Tensor.double).folded(torch.float64).parts() for update in (wanted, written))
    if first.keys() != second.keys() or any(first[part].shape != second[part].shape for part in first):
        return None
    stored = written.parts()
    if not all(_is_rounded(first[part], second[part], stored[part].dtype, written.scale) for part in first):
        return None
    if not wanted.needs_weight:
        return _ratio(*_norms(wanted, written))
    return max(_ratio(torch.linalg.vector_norm(second[part] - tensor).item(), torch.linalg.vector_norm(tensor).item())
               for part, tensor in first.items())


def _identical(a: WeightUpdate, b: WeightUpdate) -> bool:
    first, second = a.parts(), b.parts()
    return (type(a) is type(b) and a.scale == b.scale and first.keys() == second.keys()
            and all(t.shape == second[part].shape and torch.equal(t.double(), second[part].double())
                    for part, t in first.items()))


def _is_rounded(wanted: Tensor, written: Tensor, dtype: torch.dtype, scale: float) -> bool:
    """True if every element is the wanted one, rounded in fp32 for the scale and then to `dtype`."""
    info = torch.finfo(dtype)
    relative = info.eps / 2 + 4 * torch.finfo(torch.float32).eps
    smallest = info.smallest_normal * info.eps * max(1.0, abs(scale)) + torch.finfo(torch.float32).smallest_normal
    return bool(((written - wanted).abs() <= relative * (wanted.abs() + written.abs()) + smallest).all())


def _ratio(distance: float, length: float) -> float:
    return distance / length if length > 0 else float(distance > 0)


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
    return float(torch.linalg.matrix_norm(torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T))
