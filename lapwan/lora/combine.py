"""LoRA + LoRA: exact concatenation, and a resize by SVD that keeps the largest singular values.

    concatenate:  A = [A_1; A_2; …],  B = [s_1 B_1, s_2 B_2, …],  alpha = r_1 + r_2 + …,   s_i = m_i · alpha_i / r_i
    resize to k:  B A = Q_B (R_B R_Aᵀ) Q_Aᵀ = U S Vᵀ,  B' = U_k S_k^½,  A' = S_k^½ V_kᵀ,  alpha = k
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lapwan.console import progress
from lapwan.distributed import one_thread
from lapwan.lora.state import LoraEntry, LoraState

_WORKERS = 2

# Metadata of a single training run, dropped from a sum and from a resized LoRA.
_RUN_KEYS = ("lapwan.fingerprint", "lapwan.step", "ss_steps")


@dataclass(frozen=True)
class Energy:
    """The energy a resize keeps: Σ_{i≤k} s_i² / Σ_i s_i², over all modules and in the worst one."""

    total: float
    worst: float
    worst_path: str


def scaled(state: LoraState, multiplier: float) -> LoraState:
    """multiplier · ΔW, exact: alpha is multiplied."""
    entries = {path: LoraEntry(e.down, e.up, e.alpha * multiplier) for path, e in state.entries.items()}
    return LoraState(entries, dict(state.metadata))


def concatenate(states: Sequence[tuple[LoraState, float]], dtype: torch.dtype | None = None) -> LoraState:
    """Σ multiplier · ΔW over the states; a module of only one state keeps its rank, A and B.

    Args:
        dtype: of the result; the scales are folded into B in fp32 and rounded once. None: the widest of the inputs.
    """
    paths = list(dict.fromkeys(path for state, _ in states for path in state.entries))
    entries: dict[str, LoraEntry] = {}
    for path in paths:
        terms = [(state.entries[path], multiplier) for state, multiplier in states if path in state.entries]
        if len(terms) == 1:
            (entry, multiplier), = terms
            entries[path] = LoraEntry(entry.down, entry.up, entry.alpha * multiplier)
            continue
        widest = terms[0][0].up.dtype
        for entry, _ in terms:
            widest = torch.promote_types(widest, torch.promote_types(entry.up.dtype, entry.down.dtype))
        target_dtype = dtype or widest
        down = torch.cat([entry.down.to(target_dtype) for entry, _ in terms])
        up = torch.cat([(entry.up.float() * (m * entry.scale)).to(target_dtype) for entry, m in terms], dim=1)
        entries[path] = LoraEntry(down, up, float(down.shape[0]))
    return LoraState(entries, _common_metadata([state for state, _ in states]))


def combine(
    states: Sequence[tuple[LoraState, float]], rank: int | None = None, dtype: torch.dtype | None = None
) -> tuple[LoraState, Energy | None]:
    """Σ multiplier · ΔW as one LoRA in `dtype` (None: the widest of the inputs), resized to `rank` if given."""
    state = scaled(*states[0]) if len(states) == 1 else concatenate(states, dtype)
    if rank is None:
        return state, None
    target_dtype = dtype or max((entry.up.dtype for entry in state.entries.values()), key=lambda d: d.itemsize)
    state, energy = resize(state, rank)
    for entry in state.entries.values():
        entry.down, entry.up = entry.down.to(target_dtype), entry.up.to(target_dtype)
    return state, energy


def _common_metadata(states: Sequence[LoraState]) -> dict[str, str]:
    """Entries that are equal in all inputs."""
    first, *rest = (state.metadata for state in states)
    shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in rest)}
    return {k: v for k, v in shared.items() if not rest or k not in _RUN_KEYS}


def resize(state: LoraState, rank: int) -> tuple[LoraState, Energy]:
    """The best rank-`rank` approximation of every ΔW in the Frobenius norm (Eckart-Young); lower ranks are kept.

    Returns:
        The resized LoRA in fp32, scale 1, and the energy kept.
    """
    entries: dict[str, LoraEntry] = {}
    kept_sum = all_sum = 0.0
    worst = (2.0, "")
    with one_thread(), ThreadPoolExecutor(_WORKERS) as pool, progress("resize", len(state.entries), "module") as bar:
        parts = pool.map(lambda entry: _resized(entry, rank), state.entries.values())
        for path, (entry, kept, total) in zip(state.entries, parts, strict=True):
            entries[path] = entry
            kept_sum, all_sum = kept_sum + kept, all_sum + total
            worst = min(worst, (kept / total if total > 0 else 1.0, path))
            bar.advance()
    metadata = {key: value for key, value in state.metadata.items() if key not in _RUN_KEYS}
    return LoraState(entries, metadata), Energy(kept_sum / all_sum if all_sum > 0 else 1.0, *worst)


def _resized(entry: LoraEntry, rank: int) -> tuple[LoraEntry, float, float]:
    """(the resized entry, Σ s² kept, Σ s² of all)."""
    left, right, values = singular_factors(entry)
    k = min(rank, len(values))
    root = values[:k].sqrt()
    up, down = left[:, :k] * root, (right[:, :k] * root).T
    squares = values.square()
    resized = LoraEntry(down.float().contiguous(), up.float().contiguous(), float(k))
    return resized, squares[:k].sum().item(), squares.sum().item()


def singular_factors(entry: LoraEntry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [out, r'], V [in, r'], s [r']) of ΔW in fp64 by QR of the thin factors, r' = min(r, out, in)."""
    q_up, r_up = torch.linalg.qr(entry.up.double())
    q_down, r_down = torch.linalg.qr(entry.down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T * entry.scale, full_matrices=False)
    return q_up @ u, q_down @ vh.T, s
