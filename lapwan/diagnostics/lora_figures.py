"""Numbers about one adapter: of low-rank pairs magnitudes, norms and spectra, module by module, without forming B A; of
other kinds of update ‖ΔW‖, tile by tile, and the spectra of products (LoKr, LoHa) from their factors.

    ‖s·BA‖²_F = s² · Σ (A Aᵀ) ∘ (Bᵀ B)                                   r x r Gram matrices in fp64
    σ(s·BA)²  = s² · eigenvalues of G^½ (A Aᵀ) G^½,  G = Bᵀ B
    stable rank = ‖ΔW‖²_F / σ_1²;   effective rank = exp(−Σ p_i ln p_i), p_i = σ_i / Σ σ   (Roy & Vetterli 2007)
    ⟨B_1 A_1, B_2 A_2⟩ = Σ (A_1 A_2ᵀ) ∘ (B_1ᵀ B_2)

Singular values are accurate to about 1e-8 of the largest, because they are roots of fp64 eigenvalues: enough for all of
these figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile
from lapwan.checkpoints.tensors import DTYPES, load_tensor
from lapwan.checkpoints.wan_keys import split_block, target_label
from lapwan.checkpoints.weights import read_weights
from lapwan.distributed import one_thread
from lapwan.errors import UserError
from lapwan.lora.merge import target_tensors
from lapwan.lora.state import Entry, LowRank

LARGEST = math.sqrt(torch.finfo(torch.float32).max)  # of norms and sums: beyond it a square overflows in fp32
_WORKERS = 2
_TILE = 1 << 20  # elements summed at once, in fp64: a sum of squares in fp32 is off in the sixth digit


@dataclass(frozen=True)
class ModuleFigures:
    """One module. `sum_abs_*` are Σ|w| over its elements, which of a kind other than LoRA are all in `elements_other`;
    spectrum figures are NaN for a dead or non-finite module, and where only ΔW itself has them. Non-finite: NaN,
    infinite, or sums or a norm above `LARGEST`."""

    path: str
    rank: int | None
    elements_a: int
    elements_b: int
    sum_abs_a: float
    sum_abs_b: float
    floor_sum: float
    delta_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    finite: bool
    kind: str = LowRank.KIND
    elements_other: int = 0

    @property
    def dead(self) -> bool:
        """A pair whose ΔW is exactly zero changes nothing. Some tools write zero full deltas by design."""
        return self.finite and self.delta_norm == 0.0 and self.kind == LowRank.KIND

    @property
    def block(self) -> str:
        """`7`, or `outer` for a module outside the blocks."""
        return _block_and_projection(self.path)[0]

    @property
    def projection(self) -> str:
        """`self_attn.q`, as users name it."""
        return _block_and_projection(self.path)[1]


def _block_and_projection(path: str) -> tuple[str, str]:
    """(block, projection) of a target, or of a mixture's `{module}.{family}`."""
    module = path.rpartition(".")[0]
    return target_label(module if split_block(module) and not path.endswith(".bias") else path)


@dataclass(frozen=True)
class Figures:
    """A group of modules: a noise expert, a block or a projection. None where a figure does not exist.

    `legacy_mean_abs` is mean|w| over all elements of A and B without alpha: the users' "weight magnitude".
    `init_floor` is its value at B = 0 and a Kaiming-uniform A (mean|A| = 1 / (2·√in)), from the group's shapes.
    """

    modules: int
    parameters: int
    rank: int | None
    legacy_mean_abs: float | None
    init_floor: float | None
    mean_abs_A: float | None
    mean_abs_B: float | None
    delta_norm: float | None
    spectral_norm_max: float | None
    stable_rank_mean: float | None
    effective_rank_mean: float | None
    nonfinite_modules: int
    dead_modules: int

    @property
    def net_mean_abs(self) -> float | None:
        """`legacy_mean_abs` less the floor: the part that training added."""
        if self.legacy_mean_abs is None or self.init_floor is None:
            return None
        return self.legacy_mean_abs - self.init_floor


class _Grams:
    """A Aᵀ and s²·Bᵀ B of all modules of one rank, in two preallocated blocks.

    Small tensors that outlive the large temporaries around them fragment the heap: 600 MB for a rank-32 pair, measured.
    """

    def __init__(self, count: int, rank: int) -> None:
        self.a = torch.zeros(count, rank, rank, dtype=torch.float64)
        self.b = torch.zeros(count, rank, rank, dtype=torch.float64)
        self.indices: list[int] = []

    def spectra(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(σ_1, stable rank, effective rank) of the modules in `rows`."""
        values, vectors = torch.linalg.eigh(self.b[rows])
        half = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # G = half halfᵀ, so σ² = eig(halfᵀ A Aᵀ half)
        squares = torch.linalg.eigvalsh(half.mT @ self.a[rows] @ half).clamp_min(0)
        sigma = squares.sqrt()
        share = sigma / sigma.sum(-1, keepdim=True)
        entropy = -torch.special.xlogy(share, share).sum(-1)
        return sigma[:, -1], squares.sum(-1) / squares[:, -1], entropy.exp()


def measure(
    modules: Mapping[str, Entry], spectrum: bool = True, weight: Callable[[str], Tensor] | None = None
) -> list[ModuleFigures]:
    """Figures of every module; at most two are in memory at a time.

    Args:
        modules: updates by path.
        spectrum: False skips the eigenvalues.
        weight: reads the base's weight of a module; needed by DoRA.

    Raises:
        UserError: a DoRA, without `weight`.
    """
    by_rank: dict[int, _Grams] = {}
    ranks = [module.rank for module in modules.values() if module.stackable]
    for rank in set(ranks):
        by_rank[rank or 0] = _Grams(ranks.count(rank), rank or 0)
    jobs: list[tuple[str, Entry, Tensor | None, Tensor | None]] = []
    for index, (path, module) in enumerate(modules.items()):
        if not module.stackable:
            if module.needs_weight and weight is None:
                raise UserError(f"module '{path}' is a {module.kind}, whose update depends on the base's weights; give "
                                "the base with --base MODEL")
            jobs.append((path, module, None, None))
            continue
        grams = by_rank[module.rank or 0]
        row = len(grams.indices)
        grams.indices.append(index)
        jobs.append((path, module, grams.a[row], grams.b[row]))
    with one_thread(), ThreadPoolExecutor(_WORKERS) as pool:  # one module is read while another is computed
        figures = list(pool.map(lambda job: _measure(*job, weight=weight, spectrum=spectrum), jobs))
    for grams in by_rank.values() if spectrum else ():
        rows = [r for r, i in enumerate(grams.indices) if figures[i].finite and not figures[i].dead]
        if rows:
            for row, top, stable, effective in zip(rows, *(part.tolist() for part in grams.spectra(rows)), strict=True):
                index = grams.indices[row]
                figures[index] = replace(
                    figures[index], spectral_norm=top, stable_rank=stable, effective_rank=effective)
    return figures


def _measure(
    path: str, module: Entry, gram_a: Tensor | None, gram_b: Tensor | None, *, weight: Callable[[str], Tensor] | None,
    spectrum: bool,
) -> ModuleFigures:
    entry = module.entry()
    if gram_a is None or gram_b is None or not isinstance(entry, LowRank):
        norm = entry.norm(weight(path) if entry.needs_weight and weight is not None else None)
        sigma = entry.singular_values() if spectrum and 0 < norm <= LARGEST else None
        top, stable, effective = (math.nan,) * 3 if sigma is None else _spectrum(sigma)
        return ModuleFigures(
            path=path, rank=entry.rank, elements_a=0, elements_b=0, sum_abs_a=0.0, sum_abs_b=0.0, floor_sum=0.0,
            delta_norm=norm if norm <= LARGEST else math.nan, spectral_norm=top, stable_rank=stable,
            effective_rank=effective, finite=norm <= LARGEST, kind=entry.kind,
            elements_other=sum(tensor.numel() for tensor in entry.parts().values()),
        )
    down, up = entry.down.double(), entry.up.double()
    torch.mm(down, down.T, out=gram_a)
    torch.mm(up.T, up, out=gram_b)
    gram_b *= entry.scale * entry.scale  # a power of a float would raise where this is infinite
    square = torch.dot(gram_a.view(-1), gram_b.view(-1)).item()
    sum_a, sum_b = down.abs_().sum().item(), up.abs_().sum().item()
    norm = math.sqrt(max(square, 0.0))  # a sum of products that cancel may round to slightly below zero
    finite = all(value <= LARGEST for value in (norm, sum_a, sum_b))
    return ModuleFigures(
        path=path, rank=entry.rank, elements_a=down.numel(), elements_b=up.numel(), sum_abs_a=sum_a, sum_abs_b=sum_b,
        floor_sum=down.numel() / (2.0 * math.sqrt(down.shape[1])),
        delta_norm=norm if finite else math.nan,
        spectral_norm=math.nan, stable_rank=math.nan, effective_rank=math.nan, finite=finite,
    )


def _spectrum(sigma: Tensor) -> tuple[float, float, float]:
    """(σ_1, stable rank, effective rank) of singular values."""
    top, share = sigma.max(), sigma / sigma.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return top.item(), (sigma.square().sum() / top.square()).item(), entropy.exp().item()


def summarise(modules: Iterable[ModuleFigures]) -> Figures:
    """Figures of a group; a non-finite module counts in `nonfinite_modules` and the sizes only."""
    group = list(modules)
    finite = [m for m in group if m.finite]
    live = [m for m in finite if not m.dead and not math.isnan(m.spectral_norm)]
    count_a, count_b = sum(m.elements_a for m in finite), sum(m.elements_b for m in finite)
    sum_a, sum_b = math.fsum(m.sum_abs_a for m in finite), math.fsum(m.sum_abs_b for m in finite)
    ranks = [m.rank for m in group if m.rank is not None]
    return Figures(
        modules=len(group),
        parameters=sum(m.elements_a + m.elements_b + m.elements_other for m in group),
        rank=max(set(ranks), key=ranks.count) if ranks else None,
        legacy_mean_abs=_ratio(sum_a + sum_b, count_a + count_b),
        init_floor=_ratio(math.fsum(m.floor_sum for m in finite), count_a + count_b),
        mean_abs_A=_ratio(sum_a, count_a),
        mean_abs_B=_ratio(sum_b, count_b),
        delta_norm=math.sqrt(math.fsum(m.delta_norm**2 for m in finite)) if finite else None,
        spectral_norm_max=max((m.spectral_norm for m in live), default=None),
        stable_rank_mean=mean([m.stable_rank for m in live]),
        effective_rank_mean=mean([m.effective_rank for m in live]),
        nonfinite_modules=len(group) - len(finite),
        dead_modules=sum(m.dead for m in group),
    )


def group_by(modules: Iterable[ModuleFigures], key: Callable[[ModuleFigures], str]) -> dict[str, list[ModuleFigures]]:
    """Modules by block or projection, in order.

    Args:
        modules: figures of each module.
        key: the group of a module.
    """
    groups: dict[str, list[ModuleFigures]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return groups


def inner_product(first: LowRank, second: LowRank) -> float:
    """⟨ΔW_1, ΔW_2⟩ (Frobenius) of two updates of one Linear, in fp64; ranks may differ.

    Args:
        first, second: updates of the same tensor.
    """
    across_a = first.down.double() @ second.down.double().T
    across_b = first.up.double().T @ second.up.double()
    return (across_a * across_b).sum().item() * first.scale * second.scale


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return math.fsum(values) / len(values) if values else None


def weight_norms(
    files: Sequence[Path], paths: Iterable[str], advance: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """‖W‖_F of the tensors that `paths` name in a transformer, streamed in tiles.

    Args:
        files: the transformer's weight files.
        paths: diffusers' paths of the tensors.
        advance: called with 1 after each tensor.

    Raises:
        UserError: a module that the transformer lacks.
    """
    headers = [read_weights(path) for path in files]
    weights = target_tensors(headers)
    modules = list(paths)
    for path in modules:
        _check_has(files, weights, path)
    with one_thread(), ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda path: _norm(headers[weights[path][0]], weights[path][1]), modules)
        norms: dict[str, float] = {}
        for path, norm in zip(modules, results, strict=True):
            norms[path] = norm
            advance(1)
        return norms


def _check_has(files: Sequence[Path], weights: Mapping[str, object], path: str) -> None:
    if path not in weights:
        raise UserError(f"--base {files[0].parent}: no module '{path}'; the LoRA was made for another model")


def weight_reader(files: Sequence[Path]) -> Callable[[str], Tensor]:
    """A function that reads the tensor which a path names in a transformer.

    Raises:
        UserError: at a call, a tensor that the transformer lacks.
    """
    headers = [read_weights(path) for path in files]
    weights = target_tensors(headers)

    def read(path: str) -> Tensor:
        _check_has(files, weights, path)
        index, name = weights[path]
        return load_tensor(headers[index], name)

    return read


def _norm(file: TensorFile, name: str) -> float:
    info = file.tensors[name]
    if info.dtype not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{file.path}: '{name}' is {info.dtype}; norms need an unquantised model")
    item, squares = ITEM_SIZE[info.dtype], []
    for offset in range(0, info.size, _TILE * item):
        raw = file.read(name, offset, min(_TILE * item, info.size - offset))
        tile = torch.frombuffer(raw, dtype=DTYPES[info.dtype]).double()
        squares.append(torch.dot(tile, tile).item())
    return math.sqrt(math.fsum(squares))
