"""Flow losses on held-out clips: the terms that training minimises, unweighted, at the same draws for every adapter.

Each noise expert's band is divided into equal bins; in each, sigma and noise are keyed by the clip.
    loss outside the region = (N·L − M·L_roi) / (N − M),  M = Σ m the region's mass, N the number of latent cells
Shapes: P clips, K draws of a clip (bin by bin), B samples, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lapwan import rng
from lapwan.caching.collate import Batch
from lapwan.caching.index import CachedItem
from lapwan.errors import UserError
from lapwan.evaluation.arms import TRUTH, WRONG, Arm
from lapwan.evaluation.clips import EvaluationClip
from lapwan.losses.sigmas import Uniform
from lapwan.names import NoiseExpert
from lapwan.sampling.expert_mix import alpha_vector, choose_mix
from lapwan.sampling.generator import Generator
from lapwan.train.callbacks.validation import fixed_draws
from lapwan.train.clip_store import ClipStore
from lapwan.train.objective import Draws, SigmaRule, counted_frames, flow_terms

# If the region covers nearly everything, the difference above is rounding: 1e-7 of L over the fraction left outside.
_MIN_OUTSIDE = 1e-4


@dataclass(frozen=True)
class FlowPlan:
    """`bins` of sigma per noise expert, `draws` per bin, `batch_size` clips at a time; `first_frame`: the first latent
    frame of each is given clean."""

    bins: int = 4
    draws: int = 1
    seed: int = 0
    batch_size: int = 4
    first_frame: bool = False


@dataclass(frozen=True)
class FlowLosses:
    """One noise expert's losses: `whole_PK`, `roi_PK` and `outside_PK` (NaN where there is none), at `sigma_PK`.

    Draw k lies in bin k // draws.
    """

    sigma_PK: np.ndarray
    whole_PK: np.ndarray
    roi_PK: np.ndarray
    outside_PK: np.ndarray


def evaluation_clip(item: CachedItem, families: int) -> EvaluationClip:
    """A cached item as an evaluation clip."""
    weights = item.label_weights or ()
    if not weights and item.label is not None:
        weights = tuple(float(i == item.label) for i in range(families))
    return EvaluationClip(item.id, item.caption, weights, item.fallback)


def check_labels(arm: Arm, items: Sequence[CachedItem], folder: Path) -> None:
    """Check that the labels of a cache `folder` fit a mixture's families and its arm's hints.

    Raises:
        UserError: labels of other families than the mixture's, or no labels for hints that need them.
    """
    families = _families(arm)
    if not families:
        return
    for item in items:
        clip = evaluation_clip(item, families)
        if clip.weights and (len(clip.weights) != families or not any(clip.weights)):
            label = f"{len(clip.weights)} weights" if item.label_weights else f"number {item.label}"
            raise UserError(f"{folder}: the label of '{item.id}' ({label}) does not fit the {families} families of "
                            f"adapter '{arm.name}'; give labels of its taxonomy: loss.labels=FILE")
        if not clip.weights and arm.hint in (TRUTH, WRONG):
            raise UserError(f"{folder}: '{item.id}' has no label, which the hint of adapter '{arm.name}' ({arm.hint}) "
                            "needs; give labels: loss.labels=FILE, or adapters without such a hint")


@torch.no_grad()
def flow_losses(
    generator: Generator, arm: Arm, store: ClipStore, plan: FlowPlan,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[NoiseExpert, FlowLosses]:
    """An arm's losses on every clip of a store, by noise expert.

    Args:
        generator: on the arm's model; this call sets the arm's adapters and keeps the loaded weights.
        advance: called with the number of finished samples (clips × bins × draws × noise experts in all).
    """
    generator.use(arm.base, arm.adapters)
    clips = [evaluation_clip(item, _families(arm)) for item in store.items]
    frames, height, width = max((item.bucket for item in store.items), key=math.prod)
    generator.noise_experts.plan(frames, (height, width), guided=False, batch=plan.batch_size)
    generator.noise_experts.expect({}, (0, 0, 0))  # no video is generated: forget the last request
    losses = {}
    for noise_expert in arm.base.spec.noise_experts:
        table = np.full((4, len(clips), plan.bins * plan.draws), np.nan)
        rule = SigmaRule(Uniform(), arm.base.bands[noise_expert])
        for part in _batches(store, plan.batch_size):
            batch = store.batch(part)
            for k in range(plan.bins * plan.draws):
                draws = fixed_draws(rule, batch, _positions(plan, noise_expert, batch, k), (plan.seed, "evaluate"), k,
                                    float(plan.first_frame))
                table[:, part, k] = _losses(generator, arm, noise_expert, [clips[i] for i in part], batch, draws)
                advance(len(part))
        losses[noise_expert] = FlowLosses(*table)
    return losses


def _families(arm: Arm) -> int:
    return 0 if arm.adapters.mixture is None else len(arm.adapters.mixture.families)


def _batches(store: ClipStore, size: int) -> list[list[int]]:
    """Indices of clips in batches, each of one bucket."""
    buckets: dict[tuple[int, int, int], list[int]] = {}
    for index, item in enumerate(store.items):
        buckets.setdefault(item.bucket, []).append(index)
    return [indices[i : i + size] for indices in buckets.values() for i in range(0, len(indices), size)]


def _positions(plan: FlowPlan, noise_expert: NoiseExpert, batch: Batch, k: int) -> list[float]:
    """Position in [0, 1) of each clip's draw k in the band, uniform within its bin."""
    positions = []
    for clip in batch.ids:
        u = rng.uniform(plan.seed, "evaluate", clip, noise_expert.value, k, "sigma")
        positions.append((k // plan.draws + u) / plan.bins)
    return positions


def _losses(
    generator: Generator, arm: Arm, noise_expert: NoiseExpert, clips: Sequence[EvaluationClip], batch: Batch,
    draws: Draws,
) -> np.ndarray:
    """[4, B]: sigma, and the loss over the whole latent, inside the region, outside it."""
    backbone = generator.noise_experts.backbone(noise_expert)
    gates_BG = torch.cat([_gates(arm, noise_expert, clip, text.cpu(), float(sigma)) for clip, text, sigma in
                          zip(clips, batch.text, draws.sigma_B.tolist(), strict=True)])
    with generator.noise_experts.scope(noise_expert, gates_BG.to(generator.device)):
        loss = flow_terms(backbone, batch, draws, 1.0, None)
    whole_B = loss.figures["loss/diffusion"].double().cpu()
    inside_B, outside_B = torch.full_like(whole_B, torch.nan), torch.full_like(whole_B, torch.nan)
    if batch.roi_BTHW is not None:
        roi = batch.roi_BTHW.double()
        counted = torch.ones_like(roi) if draws.clean_B is None else counted_frames(
            batch.latents_BCTHW, draws.clean_B).double()[:, :, None, None].expand_as(roi)
        mass_B, cells_B = ((part * counted).flatten(1).sum(dim=1).cpu() for part in (roi, torch.ones_like(roi)))
        present = mass_B > 0
        inside_B[present] = loss.figures["loss/roi"].double().cpu()
        rest_B = cells_B - mass_B
        outside_B = (cells_B * whole_B - mass_B * inside_B) / rest_B
        outside_B[rest_B < _MIN_OUTSIDE * cells_B] = torch.nan
    rows_4B: np.ndarray = torch.stack([draws.sigma_B.double().cpu(), whole_B, inside_B, outside_B]).numpy()
    return rows_4B


def _gates(arm: Arm, noise_expert: NoiseExpert, clip: EvaluationClip, text: torch.Tensor, sigma: float) -> torch.Tensor:
    """[1, G]: the gates that a generation of this clip would have at this sigma."""
    mixture = arm.adapters.mixture
    mix = None if mixture is None else choose_mix(mixture, clip.prompt, arm.hint_for(clip), lambda: text, [sigma])
    return arm.adapters.gates(
        noise_expert, sigma, None if mix is None else mix.at(sigma), 1.0 if arm.alpha_base is None else arm.alpha_base,
        None if mixture is None else alpha_vector(mixture, arm.alpha_expert),
    )
