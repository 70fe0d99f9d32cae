"""Load a noise expert's transformer and ask it for a velocity.

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
from lapwan.wan.transformer.first_block_cache import Side
from lapwan.wan.transformer.forward import TokenTimes, predict
from lapwan.wan.transformer.options import Prompt

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
        have = ", ".join(e.value for e in spec.noise_experts)
        raise UserError(f"model {spec.path} has no {noise_expert.value} noise expert; it has: {have}")
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
    """Weights on a CPU where torch itself would have put them: products round by alignment, which in a mapped file
    depends on the length of its header; so the same weights from another file would give other last bits."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model


def velocity(
    transformer: WanTransformer3DModel,
    x_BCTHW: Tensor,
    timestep: Tensor | TokenTimes,
    text: Tensor | Sequence[Tensor] | Prompt,
    condition_BCTHW: Tensor | None = None,
    reuse: Side | None = None,
) -> Tensor:
    """v̂ = model([x | condition], timestep, text), in fp32 or the latents' wider dtype.

    Args:
        timestep: 1000·sigma in training, the scheduler's own (integer for UniPC) in sampling; never in bf16. [B], one a
            token [B, N], or a sequence's few distinct ones.
        text: features [B, L, D]; those of each sample without padding; or a generation's prompt, which remembers what
            every step would compute again.
        condition_BCTHW: I2V's mask and image channels [B, 20, T, H, W], None for T2V.
        reuse: lets a generation's step keep what an earlier one computed.
    """
    dtype = transformer.patch_embedding.weight.dtype
    hidden = x_BCTHW if condition_BCTHW is None else torch.cat([x_BCTHW, condition_BCTHW.to(x_BCTHW)], dim=1)
    given: Tensor | Sequence[Tensor] | Prompt
    if isinstance(text, Prompt):
        given = text
    else:
        given = text.to(dtype) if isinstance(text, Tensor) else [one.to(dtype) for one in text]
    out = predict(transformer, hidden.to(dtype), timestep, given, reuse)
    return out.to(torch.promote_types(x_BCTHW.dtype, torch.float32))
