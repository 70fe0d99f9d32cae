"""LoRA + LoRA: exact concatenation, and a resize by SVD that keeps the largest singular values.

    concatenate:  A = [A_1; A_2; …],  B = [s_1 B_1, s_2 B_2, …],  alpha = r_1 + r_2 + …,   s_i = m_i · alpha_i / r_i
    full deltas:  Σ m_i · ΔW_i in fp32, rounded once; other kinds cannot be summed in a file
    resize to k:  B A = Q_B (R_B R_Aᵀ) Q_Aᵀ = U S Vᵀ,  B' = U_k S_k^½,  A' = S_k^½ V_kᵀ,  alpha = k
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lapwan.console import progress
from lapwan.distributed import one_thread
from lapwan.errors import UserError
from lapwan.lora.kinds import FullDelta
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate, refuse_overflow

_WORKERS = 2

# Metadata of a single training run, dropped from a sum and from a resized LoRA.
_RUN_KEYS = ("lapwan.fingerprint", "lapwan.step", "ss_steps")


@dataclass(frozen=True)
class Energy:
    """The energy a resize keeps: Σ_{i≤k} s_i² / Σ_i s_i², over all modules and in the worst one."""

    total: float
    worst: float
    worst_path: str


def scaled(state: AdapterState, multiplier: float) -> AdapterState:
    """multiplier · ΔW: exact where there is an alpha, which is multiplied.

    Args:
        state: the adapter; it is not changed.
        multiplier: factor on every ΔW.

    Raises:
        UserError: a DoRA and a multiplier other than 1.
    """
    return AdapterState({path: e.scaled(multiplier) for path, e in state.entries.items()}, dict(state.metadata))


def concatenate(states: Sequence[tuple[AdapterState, float]], dtype: torch.dtype | None = None) -> AdapterState:
    """Σ multiplier · ΔW over the states; a module of only one state keeps its rank, A and B.

    Args:
        dtype: of the result; the scales are folded into B in fp32 and rounded once. None: the widest of the inputs.

    Raises:
        UserError: two updates of one tensor that are neither both low-rank pairs nor both full deltas.
    """
    paths = list(dict.fromkeys(path for state, _ in states for path in state.entries))
    entries: dict[str, WeightUpdate] = {}
    for path in paths:
        terms = [(state.entries[path], multiplier) for state, multiplier in states if path in state.entries]
        if len(terms) == 1:
            (entry, multiplier), = terms
            entries[path] = entry.scaled(multiplier)
            continue
        widest = next(iter(terms[0][0].parts().values())).dtype
        for entry, _ in terms:
            for tensor in entry.parts().values():
                widest = torch.promote_types(widest, tensor.dtype)
        entries[path] = _sum(path, terms, dtype or widest)
    return AdapterState(entries, _common_metadata([state for state, _ in states]))


def _sum(path: str, terms: Sequence[tuple[WeightUpdate, float]], dtype: torch.dtype) -> WeightUpdate:
    pairs = [(entry, m) for entry, m in terms if isinstance(entry, LowRank) and entry.stackable]
    if len(pairs) == len(terms):
        down = torch.cat([entry.down.to(dtype) for entry, _ in pairs])
        up = torch.cat([(entry.up.float() * (m * entry.scale)).to(dtype) for entry, m in pairs], dim=1)
        return LowRank(down, up, float(down.shape[0]))
    deltas = [(entry, m) for entry, m in terms if isinstance(entry, FullDelta)]
    if len(deltas) == len(terms) and len({entry.shape for entry, _ in deltas}) == 1:
        return FullDelta(torch.stack([entry.value.float() * m for entry, m in deltas]).sum(0).to(dtype))
    kinds = " and ".join(f"a {entry.kind} {list(entry.shape)}" for entry, _ in terms)
    raise UserError(f"module '{path}' is {kinds}: a LoRA file cannot hold their sum; merge the files into the model "
                    "instead (lapwan merge --model MODEL, --lora for each)")


def combine(
    states: Sequence[tuple[AdapterState, float]], rank: int | None = None, dtype: torch.dtype | None = None
) -> tuple[AdapterState, Energy | None]:
    """Σ multiplier · ΔW as one LoRA in `dtype` (None: the widest of the inputs), resized to `rank` if given.

    Args:
        states: adapters with their multipliers.
        rank: largest rank of the result; None: the sum of the ranks, exactly.
        dtype: of the result; None: the widest of the inputs.

    Returns:
        (the LoRA, the energy a resize kept; None without one).

    Raises:
        UserError: updates that cannot be summed in a file, or not resized, or that `dtype` cannot hold.
    """
    state = scaled(*states[0]) if len(states) == 1 else concatenate(states, dtype)
    refuse_overflow(state.entries)
    if rank is None:
        return state, None
    pairs = state.low_rank(f"--rank {rank} needs a plain LoRA")
    target_dtype = dtype or max((entry.up.dtype for entry in pairs.values()), key=lambda d: d.itemsize)
    state, energy = resize(state, rank)
    state.entries = {path: entry.map(lambda tensor: tensor.to(target_dtype)) for path, entry in state.entries.items()}
    refuse_overflow(state.entries)
    return state, energy


def _common_metadata(states: Sequence[AdapterState]) -> dict[str, str]:
    """Entries that are equal in all inputs."""
    first, *rest = (state.metadata for state in states)
    shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in rest)}
    return {k: v for k, v in shared.items() if not rest or k not in _RUN_KEYS}


def resize(state: AdapterState, rank: int) -> tuple[AdapterState, Energy]:
    """The best rank-`rank` approximation of every ΔW in the Frobenius norm (Eckart-Young); lower ranks are kept.

    Args:
        state: a plain LoRA.
        rank: largest rank of a module, at least 1.

    Returns:
        The resized LoRA in fp32, scale 1, and the energy kept.

    Raises:
        UserError: the state is not a plain LoRA.
    """
    pairs = state.low_rank("only a plain LoRA can be resized")
    entries: dict[str, WeightUpdate] = {}
    kept_sum = all_sum = 0.0
    worst = (2.0, "")
    with one_thread(), ThreadPoolExecutor(_WORKERS) as pool, progress("resize", len(pairs), "module") as bar:
        parts = pool.map(lambda entry: _resized(entry, rank), pairs.values())
        for path, (entry, kept, total) in zip(pairs, parts, strict=True):
            entries[path] = entry
            kept_sum, all_sum = kept_sum + kept, all_sum + total
            worst = min(worst, (kept / total if total > 0 else 1.0, path))
            bar.advance()
    metadata = {key: value for key, value in state.metadata.items() if key not in _RUN_KEYS}
    return AdapterState(entries, metadata), Energy(kept_sum / all_sum if all_sum > 0 else 1.0, *worst)


def _resized(entry: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """(the resized entry, Σ s² kept, Σ s² of all)."""
    left, right, values = singular_factors(entry)
    k = min(rank, len(values))
    root = values[:k].sqrt()
    up, down = left[:, :k] * root, (right[:, :k] * root).T
    squares = values.square()
    resized = LowRank(down.float().contiguous(), up.float().contiguous(), float(k))
    return resized, squares[:k].sum().item(), squares.sum().item()


def singular_factors(entry: LowRank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [out, r'], V [in, r'], s [r']) of ΔW in fp64 by QR of the thin factors, r' = min(r, out, in)."""
    q_up, r_up = torch.linalg.qr(entry.up.double())
    q_down, r_down = torch.linalg.qr(entry.down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T * entry.scale, full_matrices=False)
    return q_up @ u, q_down @ vh.T, s
