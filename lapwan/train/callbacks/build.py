"""The callbacks of a run, from its settings: max norm, alpha phases, figures of the weights, validation, previews."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lapwan.console import PlanRow, count_text
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.models.base import Base
from lapwan.models.device import pick_dtype
from lapwan.report.page import PAGE_FILE, VideoRow
from lapwan.sampling.adapters import AdapterSet
from lapwan.settings.callbacks import HealthSettings
from lapwan.settings.train import TrainSettings
from lapwan.train.callbacks.alpha_schedule import AlphaSchedule
from lapwan.train.callbacks.base import Callback
from lapwan.train.callbacks.max_norm import MaxNorm
from lapwan.train.callbacks.previews import PreviewGenerator, Previews, preview_names, preview_requests
from lapwan.train.callbacks.run_page import RunPage
from lapwan.train.callbacks.validation import Validation, held_out, labelled
from lapwan.train.callbacks.weight_figures import WeightFigures
from lapwan.train.clip_store import ClipStore
from lapwan.train.recipe import RunData, RunParts, first_frame_share
from lapwan.train.run_folder import PREVIEWS, resume_command


def check_callbacks(
    settings: TrainSettings, base: Base, data: RunData, taxonomy: Taxonomy | None = None
) -> list[PlanRow]:
    """Check the callbacks before any weights are loaded.

    Args:
        taxonomy: of the mixture that is trained: held-out clips then need labels, and previews take hints.

    Returns:
        Their part of the plan.

    Raises:
        UserError: no held-out clips, clips without labels, or previews that the model cannot generate.
    """
    rows = []
    if settings.validation.every is not None:
        items = held_out(data.index, settings)
        if taxonomy is not None and not labelled(items):
            raise UserError("clips held out for validation have no label; run `lapwan label` before `lapwan cache`")
        each = "" if base.spec.one_transformer else " of each noise expert"
        rows.append(PlanRow("validation", f"every {settings.validation.every} steps on {count_text(len(items), 'clip')}"
                                          f" at {settings.validation.sigmas} sigmas{each}"))
    if settings.preview.every is not None:
        requests = preview_requests(settings.preview, base.spec, data.items[0].bucket, taxonomy)
        first = requests[0]
        videos = count_text(len(requests), "video")
        rows.append(PlanRow("previews", f"every {settings.preview.every} steps: {videos} of {first.num_frames} frames "
                                        f"{first.size[0]}x{first.size[1]}, sampled in {first.steps} steps; "
                                        f"page {PAGE_FILE}"))
    return rows


def make_callbacks(
    settings: TrainSettings, parts: RunParts, base: Base, data: RunData, device: torch.device,
    adapter_set: AdapterSet | None = None, taxonomy: Taxonomy | None = None,
) -> list[Callback]:
    """The callbacks of a flow-matching run, in the order of their hooks.

    Args:
        adapter_set: for previews of a mixture: the mixture and its base LoRAs, which its gates need.
    """
    return [*_update_callbacks(parts, base, data),
            *_evaluation_callbacks(settings, parts, base, data, device, adapter_set or AdapterSet(), taxonomy)]


def _update_callbacks(parts: RunParts, base: Base, data: RunData) -> Iterator[Callback]:
    """Those that change the weights after an update: max norm and alpha phases."""
    adapters = parts.objective.adapters
    limits = {e: settings.max_norm for e, settings in data.noise_experts.items() if settings.max_norm is not None}
    if limits:
        yield MaxNorm(adapters, limits)
    for noise_expert, settings in data.noise_experts.items():
        if settings.alpha_schedule.phases:
            prefix = f"{noise_expert.value}."
            ups = {n: p for n, p in parts.objective.parameters.items() if n.startswith(prefix) and n.endswith(".up")}
            yield AlphaSchedule(
                noise_expert, settings.alpha_schedule, adapters[noise_expert], base.bands[noise_expert], ups,
                parts.optimizers[noise_expert.value].optimizer, settings.optimizer.gradient_powers or {}, parts.ema)


def _evaluation_callbacks(
    settings: TrainSettings, parts: RunParts, base: Base, data: RunData, device: torch.device,
    adapter_set: AdapterSet, taxonomy: Taxonomy | None,
) -> Iterator[Callback]:
    """Those that evaluate the run every few steps: figures of the weights, validation, previews."""
    yield weight_figures(parts, settings.watch.every, settings.health, base.spec.one_transformer)
    onload = parts.offload.activate
    if settings.validation.every is not None:
        store = ClipStore(data.index, held_out(data.index, settings), device)
        sigma_rules = {e: stream.sigma_rule for e, stream in parts.data.streams.items()}
        yield Validation(parts.objective, sigma_rules, store, settings.validation.every, settings.validation.sigmas,
                         settings.seed, onload, first_frame_share(settings, base.spec))
    if settings.preview.every is not None:
        requests = preview_requests(settings.preview, base.spec, data.items[0].bucket, taxonomy)
        generator = PreviewGenerator(
            base, adapter_set, device, pick_dtype(settings.dtype, device), parts.objective, onload)
        yield Previews(generator, requests, settings.output / PREVIEWS, settings.preview.every)
        first = requests[0]
        samples = {name: VideoRow(request.prompt, (), request.hint or "", request.hint or "", f"seed {request.seed}")
                   for name, request in preview_names(requests).items()}
        yield RunPage(settings.output, samples, (first.num_frames, first.size, first.fps), settings.preview.every,
                      len(parts.schedule), resume_command(parts.command, settings.output))


def weight_figures(
    parts: RunParts, every: int, health: HealthSettings, one_transformer: bool = False
) -> WeightFigures:
    """Figures of the LoRAs in training, which look up each noise expert's lr and steps."""
    adapters, streams = parts.objective.adapters, parts.data.streams
    return WeightFigures(
        adapters, lambda: {e.value: float(parts.optimizers[e.value].lr) for e in adapters},
        lambda: {e.value: stream.steps for e, stream in streams.items()}, every, health, one_transformer)
