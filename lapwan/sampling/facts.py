"""What a video was made with, for its metadata: fingerprints, the gates of every step, versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lapwan import __version__
from lapwan.models.device import hardware
from lapwan.models.fingerprints import text_encoder_fingerprint, vae_fingerprint
from lapwan.names import Precision
from lapwan.sampling.adapters import AdapterSet
from lapwan.sampling.denoise import Guidance
from lapwan.sampling.expert_mix import Mix
from lapwan.sampling.noise_experts import NoiseExperts
from lapwan.sampling.request import Request
from lapwan.sampling.scheduler import Grid, Step
from lapwan.sampling.start_image import frames_fingerprint, image_fingerprint


def video_facts(
    noise_experts: NoiseExperts, text_precision: Precision | None, request: Request, grid: Grid, mix: Mix | None,
    gates: Callable[[Step], Tensor],
) -> dict[str, Any]:
    """What the settings do not contain: fingerprints, the gates of every step, versions.

    Args:
        gates: [1, G] of a step.
    """
    import diffusers

    spec, adapters = noise_experts.base.spec, noise_experts.adapters
    facts: dict[str, Any] = {
        "model": {e.value: noise_experts.base.fingerprint(e) for e in spec.noise_experts},
        "vae": vae_fingerprint(spec), "text_encoder": text_encoder_fingerprint(spec),
        "steps": {e.value: grid.count(e) for e in spec.noise_experts},
        "versions": {"lapwan": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": str(noise_experts.device), "dtype": dtype_name(noise_experts.dtype),
        "hardware": hardware(noise_experts.device),
    }
    if noise_experts.processes.count > 1:
        facts["processes"] = noise_experts.processes.count
    if Guidance(request.guidance, request.guidance_interval).needed(grid):
        facts["guidance"] = "one batch" if noise_experts.batched_guidance else "two passes"
    for name, precision in (("precision", noise_experts.precision), ("text_precision", text_precision)):
        if precision is not None:
            facts[name] = precision.value
    if loras := lora_facts(adapters):
        facts["lora"] = loras
    for name, image in (("image", request.image), ("last_image", request.last_image)):
        if image is not None:
            facts[name] = image_fingerprint(image)
    if request.video_THWC is not None:
        facts["video"] = frames_fingerprint(request.video_THWC)
    if mix is not None:
        columns = {e: [group.name for group in adapters.groups(e)] for e in spec.noise_experts}
        by_sigma = {f"{step.sigma:.4f}": _named(columns[step.noise_expert], gates(step)[0]) for step in grid.steps}
        facts["mixture"] = adapters.mixture_fingerprint()
        facts["moe"] = {"by": mix.source, "mix": _named(mix.families, mix.mix_1E[0]), "gates": by_sigma}
    return facts


def _named(names: Sequence[str], values_G: Tensor) -> dict[str, float]:
    """Values by name, rounded to six digits."""
    return {name: round(value, 6) for name, value in zip(names, values_G.tolist(), strict=True)}


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def lora_facts(adapters: AdapterSet) -> list[dict[str, Any]]:
    """Noise expert, file name, strength and fingerprint of every LoRA."""
    uses = [(e, use) for e, loras in adapters.loras.items() for use in loras] + list(adapters.mixture_base.items())
    return [
        {"noise_expert": e.value, "file": use.path.name, "strength": use.strength, "fingerprint": use.fingerprint}
        for e, use in uses
    ]
