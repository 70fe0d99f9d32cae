"""Sums of adapters in a file, and their reduction to low-rank pairs by SVD.

    concatenate:  A = [A_1; A_2; …],  B = [s_1 B_1, s_2 B_2, …],  alpha = r_1 + r_2 + …,   s_i = m_i · alpha_i / r_i
    with a full delta:  Σ m_i · ΔW_i in fp32, rounded once
    resize to k:  ΔW = U S Vᵀ,  B' = U_k S_k^½,  A' = S_k^½ V_kᵀ,  alpha = k

The SVD is that of the factors where ΔW has low rank or is a Kronecker product, else that of ΔW (`lapwan.lora.svd`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from lapwan.checkpoints.rewrite import matrix_shape
from lapwan.checkpoints.wan_keys import to_original
from lapwan.console import progress
from lapwan.distributed import one_thread
from lapwan.errors import UserError
from lapwan.lora.checks import check_finite, check_fits
from lapwan.lora.kinds import FullDelta
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate
from lapwan.lora.svd import LeadingSvd, matrix_svd, product_svd

_WORKERS = 2
_ROWS = 256  # of ΔW at a time
_PATCH = (1, 2, 2)  # Wan's patch: the kernel of its one convolution

# Metadata of a single training run, dropped from a sum and from a resized LoRA.
_RUN_KEYS = ("lapwan.fingerprint", "lapwan.step", "ss_steps")

Terms = Sequence[tuple[WeightUpdate, float]]  # updates of one tensor with their multipliers


@dataclass(frozen=True)
class Energy:
    """The energy that a resize keeps, Σ_{i≤k} s_i² / Σ_i s_i²: over all modules, and `modules` by path.

    `unchanged` counts the changes of biases, norms and modulations, which have no low-rank form.
    """

    total: float
    modules: Mapping[str, float] = field(default_factory=dict)
    unchanged: int = 0

    def describe(self, rank: int) -> str:
        """One line: energy, relative error ‖ΔW − ΔW_k‖ / ‖ΔW‖, and the three modules that keep least."""
        worst = sorted(self.modules.items(), key=lambda item: item[1])[:3]
        line = (f"rank {rank} keeps {self.total:.4%} of the energy (squared norm), relative error "
                f"{math.sqrt(max(0.0, 1.0 - self.total)):.2g}; least in "
                + ", ".join(f"{path}: {kept:.4%}" for path, kept in worst))
        kept = f"; {self.unchanged} changes of biases, norms or modulation are kept as they are"
        return line + kept if self.unchanged else line


def concatenate(states: Sequence[tuple[AdapterState, float]], dtype: torch.dtype | None = None) -> AdapterState:
    """Σ multiplier · ΔW over the states; a module of only one state keeps its kind, rank and tensors.

    Args:
        states: (adapter, multiplier).
        dtype: of the result; the scales are folded into B in fp32 and rounded once. None: the widest of the inputs.

    Raises:
        UserError: two updates of one tensor of which the sum is neither a low-rank pair nor a full delta; a value
            too large for `dtype`.
    """
    entries = {path: _sum(path, terms, dtype) for path, terms in _by_path(states).items()}
    return AdapterState(entries, _common_metadata([state for state, _ in states]))


def _by_path(states: Sequence[tuple[AdapterState, float]]) -> dict[str, Terms]:
    paths = dict.fromkeys(path for state, _ in states for path in state.entries)
    return {path: [(state.entries[path], m) for state, m in states if path in state.entries] for path in paths}


def widest_dtype(states: Sequence[AdapterState]) -> torch.dtype:
    """The dtype that holds every tensor of the states."""
    return _widest([(entry, 1.0) for state in states for entry in state.entries.values()])


def _widest(terms: Terms) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for entry, _ in terms for tensor in entry.parts().values()))


def _sum(path: str, terms: Terms, dtype: torch.dtype | None) -> WeightUpdate:
    """Σ m · ΔW as one update."""
    if len(terms) == 1:
        (entry, multiplier), = terms
        if dtype is not None and multiplier != 1.0 and entry.alpha is None:  # the factor goes into a tensor
            entry = entry.map(lambda tensor: tensor.to(dtype))
        total = entry.scaled(multiplier)
    elif (pairs := _pairs(terms)) is not None:
        down, up = _joined(pairs, dtype or _widest(terms))
        total = LowRank(down, up, float(down.shape[0]))
    elif any(isinstance(entry, FullDelta) for entry, _ in terms):
        total = FullDelta(_dense(path, terms, torch.float32).to(dtype or _widest(terms)))
    else:
        _check_sum(path, terms)
        kinds = " and ".join(f"a {entry.kind} {list(entry.shape)}" for entry, _ in terms)
        raise UserError(f"module '{path}' is {kinds}: their sum has no exact form in a LoRA file; add --rank N to "
                        "write it as a low-rank pair by SVD, or merge the files into the model (lapwan merge --model "
                        "MODEL, --lora for each)")
    check_fits(path, total, [entry for entry, _ in terms])
    return total


def _pairs(terms: Terms) -> list[tuple[LowRank, float]] | None:
    """The terms, if all are low-rank pairs of one form."""
    pairs = [(entry, m) for entry, m in terms if isinstance(entry, LowRank)]
    forms = {(entry.down.shape[1:], entry.up.shape[:1], entry.up.shape[2:]) for entry, _ in pairs}
    return pairs if len(pairs) == len(terms) and len(forms) == 1 else None


def _joined(pairs: Sequence[tuple[LowRank, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of the sum, the scales in B."""
    return (torch.cat([entry.down.to(dtype) for entry, _ in pairs]),
            torch.cat([(entry.up.float() * (m * entry.scale)).to(dtype) for entry, m in pairs], dim=1))


def _check_sum(path: str, terms: Terms) -> None:
    for entry, _ in terms:
        if entry.needs_weight:
            raise UserError(f"module '{path}' is a {entry.kind}, whose ΔW depends on the model's weights: it has no "
                            "sum and no low-rank form without them; merge the file into the model instead (lapwan "
                            "merge --model MODEL --lora FILE)")
    shapes = {matrix_shape(entry.shape) for entry, _ in terms}
    if len(shapes) > 1:
        kinds = " and ".join(f"a {entry.kind} {list(entry.shape)}" for entry, _ in terms)
        raise UserError(f"module '{path}' is {kinds}: the files were made for different models")


def _dense(path: str, terms: Terms, dtype: torch.dtype) -> Tensor:
    """Σ m · ΔW in the shape of W."""
    _check_sum(path, terms)
    shape = max((entry.shape for entry, _ in terms), key=len)
    total = torch.zeros(matrix_shape(shape), dtype=dtype)
    for entry, multiplier in terms:
        add_rows = entry.prepare(multiplier, dtype)
        for first in range(0, len(total), _ROWS):  # products of factors need as much memory again as what they add to
            tile = total[first : first + _ROWS]
            add_rows(tile, tile, first)
    return total.reshape(shape)


def combine(
    states: Sequence[tuple[AdapterState, float]], rank: int | None = None, dtype: torch.dtype | None = None
) -> tuple[AdapterState, Energy | None]:
    """Σ multiplier · ΔW as one adapter in `dtype`, as low-rank pairs of at most `rank` if given.

    Args:
        states: adapters with their multipliers.
        rank: largest rank of the result; None: the exact sum.
        dtype: of the result; None: the widest of the inputs.

    Returns:
        (the adapter, the energy that the SVD kept; None without one).

    Raises:
        UserError: updates that cannot be summed in a file, or have no low-rank form; a value too large for `dtype`.
    """
    if rank is None:
        return concatenate(states, dtype), None
    target_dtype = dtype or widest_dtype([state for state, _ in states])
    state, energy = _reduce(states, rank)
    for path, entry in state.entries.items():
        state.entries[path] = entry.map(lambda tensor: tensor.to(target_dtype))
        check_fits(path, state.entries[path], [entry])
    return state, energy


def outline(states: Sequence[tuple[AdapterState, float]], rank: int | None = None) -> AdapterState:
    """What `combine` gives, in updates of tensors without data.

    Args:
        states: outlines of adapters, with their multipliers.
        rank: as for `combine`.

    Raises:
        UserError: as `combine`, apart from what depends on the values.
    """
    return AdapterState({path: _outlined(path, terms, rank) for path, terms in _by_path(states).items()})


def _outlined(path: str, terms: Terms, rank: int | None) -> WeightUpdate:
    shape = max((entry.shape for entry, _ in terms), key=len)
    if rank is not None and to_original(path) is not None:
        _check_sum(path, terms)
        kernel = shape[2:] or (_PATCH if path == "patch_embedding" else ())
        columns = shape[1] if shape[2:] else shape[1] // math.prod(kernel)
        return LowRank(torch.empty(rank, columns, *kernel, device="meta"),
                       torch.empty(shape[0], rank, *(1 for _ in kernel), device="meta"), float(rank))
    if len(terms) > 1 and _pairs(terms) is None and any(isinstance(entry, FullDelta) for entry, _ in terms):
        _check_sum(path, terms)
        return FullDelta(torch.empty(shape, device="meta"))
    return _sum(path, terms, None)


def _common_metadata(states: Sequence[AdapterState]) -> dict[str, str]:
    """Entries that are equal in all inputs."""
    first, *rest = (state.metadata for state in states)
    shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in rest)}
    return {k: v for k, v in shared.items() if not rest or k not in _RUN_KEYS}


def resize(state: AdapterState, rank: int) -> tuple[AdapterState, Energy]:
    """The best rank-`rank` approximation of every ΔW in the Frobenius norm (Eckart-Young); lower ranks are kept.

    Changes of biases, norms and modulations stay as they are.

    Args:
        state: the adapter.
        rank: largest rank of a module, at least 1.

    Returns:
        The pairs in fp32, scale 1, and the energy kept.

    Raises:
        UserError: a ΔW that depends on the model's weights (DoRA), or that is not finite.
    """
    return _reduce([(state, 1.0)], rank)


def _reduce(states: Sequence[tuple[AdapterState, float]], rank: int) -> tuple[AdapterState, Energy]:
    terms_of = _by_path(states)
    entries: dict[str, WeightUpdate] = {}
    kept: dict[str, float] = {}
    kept_sum = all_sum = 0.0
    with one_thread(), ThreadPoolExecutor(_WORKERS) as pool, progress("resize", len(terms_of), "module") as bar:
        parts = pool.map(lambda item: _reduced(item[0], item[1], rank), terms_of.items())
        for path, (entry, squares) in zip(terms_of, parts, strict=True):
            entries[path] = entry
            if squares is not None:
                kept[path] = squares[0] / squares[1] if squares[1] > 0 else 1.0
                kept_sum, all_sum = kept_sum + squares[0], all_sum + squares[1]
            bar.advance()
    common = _common_metadata([state for state, _ in states])
    metadata = {key: value for key, value in common.items() if key not in _RUN_KEYS}
    energy = Energy(kept_sum / all_sum if all_sum > 0 else 1.0, kept, len(entries) - len(kept))
    return AdapterState(entries, metadata), energy


def _reduced(path: str, terms: Terms, rank: int) -> tuple[WeightUpdate, tuple[float, float] | None]:
    """(the low-rank pair, (Σ s² kept, Σ s² of all)); of a tensor without a low-rank form (the sum, None)."""
    if to_original(path) is None:
        return _sum(path, terms, None), None
    for entry, _ in terms:
        check_finite(path, entry)
    _check_sum(path, terms)
    left, right, values, total = _svd(path, terms, rank)
    shape = max((entry.shape for entry, _ in terms), key=len)
    if path == "patch_embedding" and len(shape) == 2:  # a product counts the kernel into the columns
        shape = (shape[0], shape[1] // math.prod(_PATCH), *_PATCH)
    k = min(rank, len(values))
    root = values[:k].sqrt()
    down, up = (right[:, :k] * root).T.float().contiguous(), (left[:, :k] * root).float().contiguous()
    kernel = tuple(shape[2:])
    pair = LowRank(down.reshape(k, *shape[1:]), up.reshape(*up.shape, *(1 for _ in kernel)), float(k))
    return pair, (min(values[:k].square().sum().item(), total), total)


def _svd(path: str, terms: Terms, rank: int) -> LeadingSvd:
    """At least the `rank` largest singular values of Σ m · ΔW."""
    if len(terms) == 1:
        (entry, multiplier), = terms
        if (svd := entry.svd(rank)) is not None:
            return svd.times(multiplier)
    factors = [(entry.factors(), multiplier) for entry, multiplier in terms]
    if all(pair is not None for pair, _ in factors):
        ups, downs = zip(*((pair[0] * multiplier, pair[1]) for pair, multiplier in factors if pair), strict=True)
        return product_svd(torch.cat(ups, dim=1), torch.cat(downs))
    return matrix_svd(_dense(path, terms, torch.float32).flatten(1), rank)
