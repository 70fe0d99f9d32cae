"""The difference of two models as an adapter: low-rank pairs of the Linears, full deltas of all else.

    ΔW = W_tuned − W_base ≈ B A of rank k,    B = Q U S^½,  A = S^½ Vᵀ,    Qᵀ ΔW = U S Vᵀ
    Q = qr(ΔW Ω), then twice Q = qr(ΔW qr(ΔWᵀ Q)),  Ω Gaussian [in, k + 16]         randomized SVD (arXiv 0909.4061)

Rounding floor: a stored value is off by up to half the spacing s of its dtype there (of a quantised weight, of its
codes times their scale), so ΔW holds noise of energy

    F = Σ (s_tuned² + s_base²) / 12   over the values that differ,

which has full rank and is no part of the update. If even F is more than what the leading directions leave, the base
was the exact start of the training, and its term drops out. A difference below F is left out, unless a few directions
hold most of it. Of F a projection to rank k holds the share
k (out + in − k) / (out · in), and the energy kept at rank k is counted above it:

    kept(k) = (Σ_{i≤k} σ_i² − F · share(k)) / (‖ΔW‖² − F)

One module is in memory at a time, in fp32 on the device; the models' files are read in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE
from lapwan.checkpoints.rewrite import check_mergeable, matrix_shape
from lapwan.checkpoints.tensors import DTYPES, load_rows
from lapwan.checkpoints.weights import FLOATS, WeightFile, rounding_steps
from lapwan.console import progress
from lapwan.errors import UserError, nearest
from lapwan.lora.kinds import FullDelta
from lapwan.lora.merge import is_linear, target_tensors
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate
from lapwan.lora.svd import leading_directions

_PIECE = 16 << 20  # bytes of a tensor that are read at a time
_FIRST_RANK = 64  # a search for the energy begins with this many directions
_QUANTISED_FLOOR = 0.05  # by which the noise of a quantised model may exceed the predicted one
_NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding of the computation


@dataclass(frozen=True)
class RankChoice:
    """At most `rank`, and with `energy` the smallest rank that keeps this share of the energy above the floor."""

    rank: int
    energy: float | None = None


@dataclass(frozen=True)
class _Sources:
    """One tensor in the two models."""

    tuned: WeightFile
    base: WeightFile
    tuned_name: str
    base_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tuned.tensors[self.tuned_name].shape


@dataclass(frozen=True)
class _Difference:
    """ΔW [out, in] on the device, ‖ΔW‖², the number of values that differ, and Σ s²/12 over them of each model; whether
    one of them is quantised, which makes that less exact."""

    delta: Tensor
    total: float
    changed: int
    floors: tuple[float, float]
    quantised: bool = False

    @property
    def only_rounding(self) -> bool:
        """No more energy than rounding explains, with its deviation over few values."""
        return self.explained_by(sum(self.floors))

    def explained_by(self, floor: float) -> bool:
        """Whether rounding with this energy can be all of the difference."""
        allowed = 4 / math.sqrt(max(1, self.changed)) + (_QUANTISED_FLOOR if self.quantised else 0)
        return self.total <= floor * (1 + allowed)


@dataclass(frozen=True)
class ExtractedModule:
    """What was kept of one Linear. Energies are squared Frobenius norms.

    Args:
        squares: the leading σ², descending, as many as were computed.
        floor: F.
        error: ‖ΔW − B A‖² of the factors as they are written.
    """

    path: str
    shape: tuple[int, int]
    squares: Tensor
    total: float
    floor: float
    rank: int
    error: float

    @property
    def signal(self) -> float:
        """Energy above the floor."""
        return self.total - self.floor

    def captured(self, rank: int) -> float:
        """Energy above the floor at a rank; ranks beyond those computed count as the last of these."""
        rank = min(rank, len(self.squares))
        captured = float(self.squares[:rank].sum()) - self.floor * _share(rank, *self.shape)
        return min(max(captured, 0.0), self.signal)


@dataclass
class ExtractedLora:
    """The adapter of one noise expert, and what was kept.

    Args:
        unchanged: tensors that are equal in both models.
        only_rounding: tensors whose difference is no more than the rounding floor; left out.
        rest: tensors kept as full deltas.
        left_out: changed tensors that are not Linears' weights and were not kept, and their energy.
    """

    state: AdapterState = field(default_factory=lambda: AdapterState({}))
    modules: list[ExtractedModule] = field(default_factory=list)
    unchanged: int = 0
    only_rounding: int = 0
    rest: int = 0
    left_out: int = 0
    left_out_energy: float = 0.0

    def kept(self, rank: int | None = None) -> float:
        """Share of the energy above the floor, over all Linears, at a rank; None: at the ranks written."""
        captured = sum(module.captured(module.rank if rank is None else rank) for module in self.modules)
        signal = sum(module.signal for module in self.modules)
        return captured / signal if signal > 0 else 1.0

    def curve(self) -> list[tuple[int, float]]:
        """(rank, energy kept) at ranks 1, 2, 4, ... up to the largest computed."""
        most = max((len(module.squares) for module in self.modules), default=0)
        ranks = sorted({min(2**n, most) for n in range(most.bit_length() + 1)}) if most else []
        return [(rank, self.kept(rank)) for rank in ranks]

    @property
    def total(self) -> float:
        """‖ΔW‖² over the Linears."""
        return sum(module.total for module in self.modules)

    @property
    def floor(self) -> float:
        """F over the Linears."""
        return sum(module.floor for module in self.modules)

    @property
    def relative_error(self) -> float:
        """‖ΔW − B A‖ / ‖ΔW‖ over the Linears, of the factors as written."""
        return math.sqrt(sum(module.error for module in self.modules) / self.total) if self.total > 0 else 0.0


def extract(
    tuned: Sequence[WeightFile], base: Sequence[WeightFile], choice: RankChoice, keep_rest: bool = True,
    dtype: torch.dtype | None = None, device: torch.device | None = None,
) -> ExtractedLora:
    """The difference of two transformers as an adapter of one noise expert.

    Args:
        tuned, base: each transformer's file or shards; their key layouts may differ.
        choice: of each module's rank.
        keep_rest: keep changed biases, norms, modulations and the patch embedding as full deltas (fp32).
        dtype: of the factors; None: bf16 for a model in at most 16 bits, else fp32.
        device: where ΔW is decomposed; None: the CPU.

    Raises:
        UserError: different models.
    """
    device = device or torch.device("cpu")
    sources = _paired(tuned, base)
    result = ExtractedLora()
    with progress("extract", len(sources), "module") as bar:
        for path, difference in _differences(sources, device):
            shape = sources[path].shape
            if difference.changed == 0:
                result.unchanged += 1
            elif difference.only_rounding and not (is_linear(path) and _stands_out(difference)):
                result.only_rounding += 1
            elif is_linear(path):
                entry, module = _decomposed(path, difference, choice, dtype or _factor_dtype(sources[path]))
                result.state.entries[path] = entry
                result.modules.append(module)
            elif keep_rest:
                value = difference.delta.reshape(shape).to("cpu", dtype or torch.float32)
                result.state.entries[path] = FullDelta(value)
                result.rest += 1
            else:
                result.left_out += 1
                result.left_out_energy += difference.total
            bar.advance()
    return result


def check_pair(tuned: Sequence[WeightFile], base: Sequence[WeightFile]) -> None:
    """Check from the headers that two transformers have the same tensors.

    Raises:
        UserError: they have not.
    """
    _paired(tuned, base)


def _factor_dtype(pair: _Sources) -> torch.dtype:
    stored = pair.tuned.raw.tensors[pair.tuned_name].dtype
    return torch.float32 if stored in FLOATS and ITEM_SIZE[stored] > 2 else torch.bfloat16


def _paired(tuned: Sequence[WeightFile], base: Sequence[WeightFile]) -> dict[str, _Sources]:
    """Every tensor that an adapter can change, in both models.

    Raises:
        UserError: a tensor that only one of them has, other shapes, or a dtype without plain values.
    """
    in_tuned, in_base = target_tensors(tuned), target_tensors(base)
    for have, lack, files, others in ((in_tuned, in_base, tuned, base), (in_base, in_tuned, base, tuned)):
        if missing := [path for path in have if path not in lack]:
            raise UserError(f"{others[0].path} has no '{missing[0]}'{nearest(missing[0], lack)}, which "
                            f"{files[0].path} has ({len(missing)} such tensors); the two are not the same model")
    sources: dict[str, _Sources] = {}
    for path, (index, name) in in_tuned.items():
        base_index, base_name = in_base[path]
        pair = _Sources(tuned[index], base[base_index], name, base_name)
        shapes = [list(file.tensors[n].shape) for file, n in ((pair.tuned, name), (pair.base, base_name))]
        if shapes[0] != shapes[1]:
            raise UserError(f"'{path}' is {shapes[0]} in {pair.tuned.path} and {shapes[1]} in {pair.base.path}; the "
                            "two are not the same model")
        check_mergeable(pair.tuned, name)
        check_mergeable(pair.base, base_name)
        sources[path] = pair
    return sources


def _differences(sources: Mapping[str, _Sources], device: torch.device) -> Iterator[tuple[str, _Difference]]:
    """Each tensor's difference; on a GPU the next one is read while the last one is decomposed."""
    if device.type == "cpu":  # two in memory at a time would cost more than reading takes
        yield from ((path, _difference(pair, device)) for path, pair in sources.items())
        return
    paths = list(sources)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_difference, sources[paths[0]], device)
        for path, following in zip(paths, [*paths[1:], None], strict=True):
            difference = waiting.result()
            if following is not None:
                waiting = pool.submit(_difference, sources[following], device)
            yield path, difference


def _difference(pair: _Sources, device: torch.device) -> _Difference:
    rows, columns = matrix_shape(pair.shape)
    dtypes = [DTYPES[file.tensors[name].dtype] for file, name in (
        (pair.tuned, pair.tuned_name), (pair.base, pair.base_name))]
    wide = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    item = max(ITEM_SIZE[pair.tuned.tensors[pair.tuned_name].dtype], ITEM_SIZE[pair.base.tensors[pair.base_name].dtype])
    step = max(1, _PIECE // (columns * item))
    delta = torch.zeros(rows, columns, dtype=torch.float32, device=device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # ‖ΔW‖², values that differ, Σ s² of tuned and of base
    for first in range(0, rows, step):
        count = min(step, rows - first)
        tuned = load_rows(pair.tuned, pair.tuned_name, first, count)
        base = load_rows(pair.base, pair.base_name, first, count)
        if device.type == "cpu" and tuned.dtype == base.dtype and torch.equal(tuned, base):
            continue  # a GPU is faster at all of the rest
        tuned, base = tuned.to(device), base.to(device)
        piece = tuned.to(wide) - base.to(wide)
        differs = piece != 0
        delta[first : first + count] = piece
        sums += torch.stack([
            torch.linalg.vector_norm(piece, dtype=torch.float64).square(), differs.sum().double(),
            *((rounding_steps(file, name, values, first) * differs).square().sum(dtype=torch.float64)
              for file, name, values in ((pair.tuned, pair.tuned_name, tuned), (pair.base, pair.base_name, base))),
        ])
    total, changed, of_tuned, of_base = sums.tolist()
    if not math.isfinite(total):
        raise UserError(f"'{pair.tuned_name}' holds values that are not finite in {pair.tuned.path} or "
                        f"{pair.base.path}; copy or download the file again")
    stored = {pair.tuned.raw.tensors[pair.tuned_name].dtype, pair.base.raw.tensors[pair.base_name].dtype}
    return _Difference(delta, total, int(changed), (of_tuned / 12, of_base / 12), not stored <= set(FLOATS))


def _share(rank: int, rows: int, columns: int) -> float:
    """Share of full-rank noise in its projection to a rank."""
    return rank * (rows + columns - rank) / (rows * columns)


def _decomposed(
    path: str, difference: _Difference, choice: RankChoice, dtype: torch.dtype
) -> tuple[WeightUpdate, ExtractedModule]:
    delta, total = difference.delta, difference.total
    rows, columns = delta.shape
    most = min(choice.rank, rows, columns)
    count = most if choice.energy is None else min(_FIRST_RANK, most)
    while True:
        left, right, values = leading_directions(delta, count)
        squares = values.double().square().cpu()
        floor = _floor(difference, squares)
        rank = max(1, min(most, int((values > _NEGLIGIBLE * values[0]).sum())))
        if choice.energy is None:
            break
        shares = torch.tensor([_share(k, rows, columns) for k in range(1, len(squares) + 1)], dtype=torch.float64)
        kept = squares.cumsum(0) - floor * shares
        enough = (kept >= choice.energy * (total - floor)).nonzero()
        # Not one of the oversampled directions: their values are too small.
        if len(enough) and int(enough[0]) < min(rank, count):
            rank = int(enough[0]) + 1
            break
        if count >= most:
            break
        count = min(2 * count, most)
    root = values[:rank].sqrt()
    up, down = ((side[:, :rank] * root).to(dtype) for side in (left, right))
    error, step = 0.0, max(1, _PIECE // (4 * columns))  # in pieces: a norm in fp64 copies its input on a CPU
    for first in range(0, rows, step):
        left_over = torch.addmm(delta[first : first + step], up[first : first + step].float(), down.float().T, alpha=-1)
        error += float(torch.linalg.vector_norm(left_over, dtype=torch.float64)) ** 2
    entry = LowRank(down.T.contiguous().cpu(), up.contiguous().cpu(), float(rank))
    return entry, ExtractedModule(path, (rows, columns), squares, total, floor, rank, error)


def _stands_out(difference: _Difference) -> bool:
    """Whether a difference that the base's rounding could explain is an update of a base that was the exact start.

    Of noise, the leading k directions hold up to about twice their share; of an update, most of its energy.
    """
    if difference.explained_by(difference.floors[0]):
        return False
    rows, columns = difference.delta.shape
    count = min(_FIRST_RANK, max(1, min(rows, columns) // 8))
    values = leading_directions(difference.delta, count)[2][:count]
    return float(values.double().square().sum()) > math.sqrt(_share(count, rows, columns)) * difference.total


def _floor(difference: _Difference, squares: Tensor) -> float:
    """F: of both models, unless that is clearly more than what the leading directions leave.

    Of pure noise, the leading eighth of all directions takes up to 1.3 times its share.
    """
    rows, columns = difference.delta.shape
    of_tuned, of_base = difference.floors
    leading = min(len(squares), max(1, min(rows, columns) // 8))
    beyond = max(difference.total - float(squares[:leading].sum()), 0.0)
    both = of_tuned + of_base
    return both if both * (1.0 - _share(leading, rows, columns)) <= 1.5 * beyond else of_tuned
