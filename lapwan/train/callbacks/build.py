"""The periodic callbacks of a run, from its settings: figures of the weights, validation, previews."""

from __future__ import annotations

import torch

from lapwan import console
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.models.base import Base
from lapwan.models.device import pick_dtype
from lapwan.sampling.adapters import AdapterSet
from lapwan.settings.train import TrainSettings
from lapwan.train.callbacks.base import OnFirstProcess
from lapwan.train.callbacks.previews import PreviewGenerator, Previews, preview_requests
from lapwan.train.callbacks.validation import Validation, held_out, labelled
from lapwan.train.callbacks.weight_figures import WeightFigures
from lapwan.train.clip_store import ClipStore
from lapwan.train.optimizers import current_lr
from lapwan.train.recipe import RunData
from lapwan.train.run_folder import PREVIEWS
from lapwan.train.trainer import Trainer


def check_callbacks(
    settings: TrainSettings, base: Base, data: RunData, taxonomy: Taxonomy | None = None
) -> list[str]:
    """Check the callbacks before any weights are loaded.

    Args:
        taxonomy: of the mixture that is trained: held-out clips then need labels, and previews take hints.

    Returns:
        Lines for the plan of the run.

    Raises:
        UserError: no held-out clips, clips without labels, or previews that the model cannot generate.
    """
    lines = []
    if settings.validation.every is not None:
        items = held_out(data.index, settings)
        if taxonomy is not None and not labelled(items):
            raise UserError("clips held out for validation have no label; run `lapwan label` before `lapwan cache`")
        lines.append(f"validation every {settings.validation.every} steps on {len(items)} clips x "
                     f"{settings.validation.sigmas} sigmas of each noise expert")
    if settings.preview.every is not None:
        requests = preview_requests(settings.preview, base.spec, data.items[0].bucket, taxonomy)
        first = requests[0]
        lines.append(f"previews every {settings.preview.every} steps: {len(requests)} videos of {first.num_frames} "
                     f"frames {first.size[0]}x{first.size[1]} in {first.steps} steps")
    return lines


def add_callbacks(
    trainer: Trainer, settings: TrainSettings, base: Base, data: RunData, device: torch.device,
    adapter_set: AdapterSet | None = None, taxonomy: Taxonomy | None = None,
) -> None:
    """Add the periodic callbacks to a trainer; they run in the first process only.

    Args:
        adapter_set: for previews of a mixture: the mixture and its base LoRAs, which its gates need.
    """
    plan, adapters = trainer.plan, trainer.objective.adapters

    def learning_rates() -> dict[str, float]:
        return {e.value: float(current_lr(plan.optimizers[e.value])) for e in adapters}

    def steps() -> dict[str, int]:
        return {e.value: stream.steps for e, stream in plan.data_streams.items()}

    if not plan.distributed.first:
        periods = {"weights": settings.watch.every, "validation": settings.validation.every,
                   "preview": settings.preview.every}
        trainer.callbacks |= {name: OnFirstProcess(every) for name, every in periods.items() if every is not None}
        return
    trainer.callbacks["weights"] = WeightFigures(
        adapters, learning_rates, steps, settings.watch.every, settings.health)
    if settings.validation.every is not None:
        store = ClipStore(data.index, held_out(data.index, settings), device)
        sigma_rules = {e: stream.sigma_rule for e, stream in plan.data_streams.items()}
        trainer.callbacks["validation"] = Validation(
            trainer.objective, sigma_rules, store, settings.validation.every, settings.validation.sigmas, settings.seed,
            plan.before_turn)
    if settings.preview.every is not None:
        console.detail("encoding the previews' prompts")
        requests = preview_requests(settings.preview, base.spec, data.items[0].bucket, taxonomy)
        dtype = pick_dtype(settings.dtype, device)
        generator = PreviewGenerator(
            base, adapter_set or AdapterSet(), device, dtype, adapters, requests, plan.before_turn)
        folder = settings.output / PREVIEWS
        trainer.callbacks["preview"] = Previews(generator, requests, folder, settings.preview.every)
