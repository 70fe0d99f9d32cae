"""Load a noise expert's transformer and evaluate its velocity.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, L text tokens, D text features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.models.original_layout import has_original_names, load_transformer_files
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import NoiseExpert
from lapwan.wan.transformer.first_block_cache import CacheBranch
from lapwan.wan.transformer.forward import TokenTimes, predict
from lapwan.wan.transformer.prompt_cache import PromptCache

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_ALIGNMENT = 64  # bytes


def load_transformer(
    spec: ModelSpec, noise_expert: NoiseExpert, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> WanTransformer3DModel:
    """A noise expert's transformer through diffusers, frozen and in eval mode.

    diffusers keeps norms, scale_shift_table and time embedder in fp32 under a lower `dtype`, as Wan was trained.
    """
    from diffusers import WanTransformer3DModel

    if noise_expert not in spec.noise_experts:
        available = ", ".join(e.value for e in spec.noise_experts)
        raise UserError(f"model {spec.path} has no {noise_expert.value} noise expert; it has: {available}")
    folder = spec.component(noise_expert)
    files = weight_files(folder)
    if has_original_names(files):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = load_transformer_files(config, files, dtype)
    else:
        model = WanTransformer3DModel.from_pretrained(folder, dtype=dtype)
    model.requires_grad_(False)
    return _aligned(model.eval().to(device))


def _aligned(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """Copy weights on a CPU that are not aligned as torch aligns its own.

    Matrix products round differently by alignment. In a memory-mapped file it depends on the length of the header, so
    that the same weights from another file would give other last bits.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model


def velocity(
    transformer: WanTransformer3DModel,
    x_BCTHW: Tensor,
    timestep: Tensor | TokenTimes,
    text: Tensor | Sequence[Tensor] | PromptCache,
    condition_BCTHW: Tensor | None = None,
    first_block_cache: CacheBranch | None = None,
) -> Tensor:
    """v̂ = model([x | condition], timestep, text), in fp32 or the latents' wider dtype.

    Args:
        timestep: 1000·sigma in training, the scheduler's own (an integer for UniPC) in sampling; never in bf16. [B],
            [B, N] with one per token, or the few distinct ones of a sequence.
        text: features [B, L, D]; a list of each sample's without padding; or a generation's prompt cache, which keeps
            what every step would recompute.
        condition_BCTHW: I2V's mask and image channels [B, 20, T, H, W], None for T2V.
        first_block_cache: lets a step of a generation keep the residual of an earlier one, approximately.
    """
    dtype = transformer.patch_embedding.weight.dtype
    hidden = x_BCTHW if condition_BCTHW is None else torch.cat([x_BCTHW, condition_BCTHW.to(x_BCTHW)], dim=1)
    if isinstance(text, Tensor):
        text = text.to(dtype)
    elif not isinstance(text, PromptCache):
        text = [features.to(dtype) for features in text]
    out = predict(transformer, hidden.to(dtype), timestep, text, first_block_cache)
    return out.to(torch.promote_types(x_BCTHW.dtype, torch.float32))
