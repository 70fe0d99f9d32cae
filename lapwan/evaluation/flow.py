"""Flow losses on held-out clips, at draws that every adapter shares: the terms that training minimises, unweighted.

Each noise expert's band is cut into equal bins; in each, sigma and noise are keyed by the clip.
    outside the region:  (N·L − M·L_roi) / (N − M),  M = Σ m the region's mass, N the number of latent cells
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
from lapwan.caching.batch import Batch
from lapwan.caching.index import CachedItem
from lapwan.errors import UserError
from lapwan.evaluation.arms import TRUTH, WRONG, Arm
from lapwan.evaluation.clips import EvaluationClip
from lapwan.losses.sigmas import Uniform
from lapwan.names import NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.sampling.routing import alpha_vector, choose_mix
from lapwan.train.callbacks.validation import fixed_draws
from lapwan.train.clip_store import ClipStore
from lapwan.train.objective import Draws, SigmaRule, flow_terms

# Of a region that covers nearly all, the difference above is rounding: 1e-7 of the whole over the share left outside.
_LEAST_OUTSIDE = 1e-4


@dataclass(frozen=True)
class FlowPlan:
    """`bins` of sigma for each noise expert, `draws` in each, `batch_size` clips at a time."""

    bins: int = 4
    draws: int = 1
    seed: int = 0
    batch_size: int = 4


@dataclass(frozen=True)
class FlowLosses:
    """One noise expert's losses: `whole_PK`, `roi_PK` and `outside_PK` (NaN where there is none), at `sigma_PK`.

    Draw k lies in bin k // draws.
    """

    sigma_PK: np.ndarray
    whole_PK: np.ndarray
    roi_PK: np.ndarray
    outside_PK: np.ndarray


def clip_of(item: CachedItem, families: int) -> EvaluationClip:
    """A cached item as a clip to evaluate."""
    weights = item.label_weights or ()
    if not weights and item.label is not None:
        weights = tuple(float(i == item.label) for i in range(families))
    return EvaluationClip(item.id, item.caption, weights, item.fallback)


def check_labels(arm: Arm, items: Sequence[CachedItem], place: Path) -> None:
    """Whether a mixture's hints and router can be held against the labels of a cache in folder `place`.

    Raises:
        UserError: labels of other families than the mixture's, or none where a hint is made of them.
    """
    families = _families(arm)
    if not families:
        return
    for item in items:
        clip = clip_of(item, families)
        if clip.weights and (len(clip.weights) != families or not any(clip.weights)):
            said = f"{len(clip.weights)} weights" if item.label_weights else f"number {item.label}"
            raise UserError(f"{place}: the label of '{item.id}' ({said}) is not of the {families} families of adapter "
                            f"'{arm.name}'; give labels of its taxonomy: loss.labels=FILE")
        if not clip.weights and arm.hint in (TRUTH, WRONG):
            raise UserError(f"{place}: '{item.id}' has no label, of which adapter '{arm.name}' makes its hint "
                            f"({arm.hint}); give labels: loss.labels=FILE, or adapters without such a hint")


@torch.no_grad()
def flow_losses(
    generator: Generator, arm: Arm, store: ClipStore, plan: FlowPlan,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[NoiseExpert, FlowLosses]:
    """An arm's losses on every clip of a store, by noise expert.

    Args:
        generator: on the arm's model; it takes the arm's adapters here and keeps what is loaded.
        advance: told how many forward samples are done (clips × bins × draws × noise experts in all).
    """
    generator.use(arm.base, arm.adapters)
    clips = [clip_of(item, _families(arm)) for item in store.items]
    frames, height, width = max((item.bucket for item in store.items), key=math.prod)
    generator.noise_experts.plan(frames, (height, width), guided=False, batch=plan.batch_size)
    generator.noise_experts.expect({}, (0, 0, 0))  # no video is being made: what the last one asked for decides nothing here
    found = {}
    for noise_expert in arm.base.spec.noise_experts:
        table = np.full((4, len(clips), plan.bins * plan.draws), np.nan)
        rule = SigmaRule(Uniform(), arm.base.bands[noise_expert])
        for part in _batches(store, plan.batch_size):
            batch = store.batch(part)
            for place in range(plan.bins * plan.draws):
                draws = fixed_draws(rule, batch, _places(plan, noise_expert, batch, place), (plan.seed, "evaluate"), place)
                table[:, part, place] = _losses(generator, arm, noise_expert, [clips[i] for i in part], batch, draws)
                advance(len(part))
        found[noise_expert] = FlowLosses(*table)
    return found


def _families(arm: Arm) -> int:
    return 0 if arm.adapters.mixture is None else len(arm.adapters.mixture.families)


def _batches(store: ClipStore, size: int) -> list[list[int]]:
    """Indices of clips that can share a batch: of one bucket."""
    buckets: dict[tuple[int, int, int], list[int]] = {}
    for index, item in enumerate(store.items):
        buckets.setdefault(item.bucket, []).append(index)
    return [own[i : i + size] for own in buckets.values() for i in range(0, len(own), size)]


def _places(plan: FlowPlan, noise_expert: NoiseExpert, batch: Batch, place: int) -> list[float]:
    """u of each clip's draw, somewhere in its bin."""
    found = []
    for clip in batch.ids:
        own = torch.rand((), dtype=torch.float64, generator=rng.generator(
            plan.seed, "evaluate", clip, noise_expert.value, place, "sigma"))
        found.append((place // plan.draws + float(own)) / plan.bins)
    return found


def _losses(
    generator: Generator, arm: Arm, noise_expert: NoiseExpert, clips: Sequence[EvaluationClip], batch: Batch, draws: Draws
) -> np.ndarray:
    """[4, B]: sigma, whole, inside, outside."""
    transformer = generator.noise_experts.transformer(noise_expert)
    gates_BG = torch.cat([_gates(arm, noise_expert, clip, text.cpu(), float(sigma)) for clip, text, sigma in
                          zip(clips, batch.text, draws.sigma_B.tolist(), strict=True)])
    with generator.noise_experts.scope(noise_expert, gates_BG.to(generator.device)):
        loss = flow_terms(transformer, batch, draws, 1.0, None)
    whole_B = loss.figures["loss/diffusion"].double().cpu()
    inside_B, outside_B = torch.full_like(whole_B, torch.nan), torch.full_like(whole_B, torch.nan)
    if batch.roi_BTHW is not None:
        mass_B = batch.roi_BTHW.flatten(1).double().sum(dim=1).cpu()
        present, cells = mass_B > 0, float(batch.roi_BTHW[0].numel())
        inside_B[present] = loss.figures["loss/roi"].double().cpu()
        rest_B = cells - mass_B
        outside_B = (cells * whole_B - mass_B * inside_B) / rest_B
        outside_B[rest_B < _LEAST_OUTSIDE * cells] = torch.nan
    found: np.ndarray = torch.stack([draws.sigma_B.double().cpu(), whole_B, inside_B, outside_B]).numpy()
    return found


def _gates(arm: Arm, noise_expert: NoiseExpert, clip: EvaluationClip, text: torch.Tensor, sigma: float) -> torch.Tensor:
    """[1, G], as a generation of this clip would have them at this sigma."""
    mixture = arm.adapters.mixture
    mix = None if mixture is None else choose_mix(mixture, clip.prompt, arm.hint_for(clip), lambda: text, [sigma])
    return arm.adapters.gates(
        noise_expert, sigma, None if mix is None else mix.at(sigma), 1.0 if arm.alpha_base is None else arm.alpha_base,
        None if mixture is None else alpha_vector(mixture, arm.alpha_expert),
    )

