"""Wan's transformer as modules without values: what diffusers' `WanTransformer3DModel` holds, under the same names.

It runs through `lapwan.wan` on the meta device, and does not need the import of diffusers, which takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

META = torch.device("meta")
_FP32_MODULES = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")  # diffusers keeps these

_DEFAULTS = {
    "patch_size": (1, 2, 2), "in_channels": 16, "out_channels": None, "text_dim": 4096, "freq_dim": 256,
    "cross_attn_norm": True, "eps": 1e-6, "rope_max_seq_len": 1024}  # diffusers', for a config.json without them


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=META))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, device=META)


class _Parts(nn.Module):
    """Modules by name; `call` runs some of them in order."""

    def __init__(self, call: tuple[str, ...] = (), **modules: nn.Module) -> None:
        super().__init__()
        self._call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name in self._call:
            x = getattr(self, name)(x)
        return x


class _Rope(nn.Module):
    def __init__(self, head_width: int, patch: tuple[int, ...], longest: int) -> None:
        super().__init__()
        self._width, self._patch = head_width, patch
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(longest, head_width, device=META), persistent=False)

    def forward(self, latents_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        tokens = math.prod(size // patch for size, patch in zip(latents_BCTHW.shape[2:], self._patch, strict=True))
        cos, sin = (torch.empty(1, tokens, 1, self._width, device=META) for _ in range(2))
        return cos, sin


class _Timesteps(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self._channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        return torch.empty(len(timesteps), self._channels, device=META)


class _Attention(_Parts):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__(
            to_q=_linear(width, width), to_k=_linear(width, width), to_v=_linear(width, width),
            to_out=nn.ModuleList([_linear(width, width), nn.Identity()]),
            norm_q=nn.RMSNorm(width, eps, device=META), norm_k=nn.RMSNorm(width, eps, device=META))
        self.heads = heads


class _Block(_Parts):
    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        eps, inner, heads = float(config["eps"]), int(config["ffn_dim"]), int(config["num_attention_heads"])

        def norm(affine: bool) -> nn.LayerNorm:
            return nn.LayerNorm(width, eps, affine, device=META)

        ffn = nn.ModuleList([_Parts(proj=_linear(width, inner)), nn.Identity(), _linear(inner, width)])
        super().__init__(
            norm1=norm(False), attn1=_Attention(width, heads, eps), attn2=_Attention(width, heads, eps),
            norm2=norm(True) if config["cross_attn_norm"] else nn.Identity(), ffn=_Parts(net=ffn), norm3=norm(False))
        self.scale_shift_table = _parameter(1, 6, width)


class ShapeModel(_Parts):
    """A transformer of `num_layers` blocks on the meta device, frozen, in `dtype` where diffusers' would be.

    Args:
        config: of the checkpoint's config.json.
    """

    def __init__(self, config: Mapping[str, Any], num_layers: int, dtype: torch.dtype) -> None:
        config = {**_DEFAULTS, **config}
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        patch = tuple(config["patch_size"])
        layers = ("linear_1", "act", "linear_2")
        embedder = _Parts(
            timesteps_proj=_Timesteps(int(config["freq_dim"])),
            time_embedder=_Parts(layers, linear_1=_linear(int(config["freq_dim"]), width), act=nn.SiLU(),
                                 linear_2=_linear(width, width)),
            act_fn=nn.SiLU(), time_proj=_linear(width, 6 * width),
            text_embedder=_Parts(layers, linear_1=_linear(int(config["text_dim"]), width),
                                 act=nn.GELU(approximate="tanh"), linear_2=_linear(width, width)))
        super().__init__(
            rope=_Rope(int(config["attention_head_dim"]), patch, int(config["rope_max_seq_len"])),
            patch_embedding=nn.Conv3d(int(config["in_channels"]), width, patch, patch, device=META),
            condition_embedder=embedder, blocks=nn.ModuleList(_Block(config, width) for _ in range(num_layers)),
            norm_out=nn.LayerNorm(width, float(config["eps"]), False, device=META),
            proj_out=_linear(width, int(config["out_channels"] or config["in_channels"]) * math.prod(patch)))
        self.scale_shift_table = _parameter(1, 2, width)
        self.config = SimpleNamespace(**config)
        for name, parameter in self.named_parameters():
            if not any(part in _FP32_MODULES for part in name.split(".")):
                parameter.data = parameter.data.to(dtype)
        self.requires_grad_(False).eval()
