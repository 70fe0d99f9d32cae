"""`WanBackbone`: a noise expert that answers `velocity(x, timestep, text, condition)`.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, L text tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.faults import library_reads
from lapwan.models.configs import component_config
from lapwan.models.original_layout import check_filled, load_transformer_files, loads_by_name
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import Checkpointing, NoiseExpert
from lapwan.wan.text import pad_text
from lapwan.wan.transformer.block import block_forward
from lapwan.wan.transformer.compile import compiled_block
from lapwan.wan.transformer.context_parallel import ContextParallel
from lapwan.wan.transformer.first_block_cache import CacheBranch
from lapwan.wan.transformer.forward import ForwardOptions, Residency, TokenTimes, predict
from lapwan.wan.transformer.prompt import Prompt, PromptCache, TextRows

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_ALIGNMENT = 64  # bytes


def load_transformer(
    spec: ModelSpec, noise_expert: NoiseExpert, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> WanTransformer3DModel:
    """A noise expert's transformer through diffusers, frozen and in eval mode.

    diffusers keeps norms, scale_shift_table and time embedder in fp32 under a lower `dtype`, as Wan was trained.

    Args:
        spec: the model.
        noise_expert: whose transformer.
        dtype: of the blocks' weights.
        device: of the weights.

    Raises:
        UserError: the model lacks the noise expert, or a file is damaged or does not fit its config.
    """
    from diffusers import WanTransformer3DModel
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()  # "Loading checkpoint shards" would break our own progress lines
    if noise_expert not in spec.noise_experts:
        available = ", ".join(e.value for e in spec.noise_experts)
        raise UserError(f"model {spec.path} has no {noise_expert.value} noise expert; it has: {available}")
    folder = spec.component(noise_expert)
    files = weight_files(folder)
    config = component_config(folder)
    with library_reads("the transformer", folder):
        if loads_by_name(files):
            model = load_transformer_files(config, files, dtype)
        else:
            model = WanTransformer3DModel.from_pretrained(folder, dtype=dtype)
    check_filled(model, folder)
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


class WanBackbone:
    """A noise expert: its transformer, how the transformer's forward runs, and what it keeps of a generation's prompts.

    Args:
        transformer: diffusers' module, whose Linears may be any module that maps [..., I] to [..., O].
        options: afterwards changed through the methods below only.
    """

    def __init__(self, transformer: WanTransformer3DModel, options: ForwardOptions | None = None) -> None:
        self.transformer, self.options = transformer, options or ForwardOptions()
        self._prompts: dict[Prompt, PromptCache] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        dtype: torch.dtype = self.transformer.patch_embedding.weight.dtype
        return dtype

    def velocity(
        self, x_BCTHW: Tensor, timestep: Tensor | TokenTimes, text: Tensor | Sequence[Tensor] | TextRows | Prompt,
        condition_BCTHW: Tensor | None = None, first_block_cache: CacheBranch | None = None,
    ) -> Tensor:
        """v̂ = model([x | condition], timestep, text), in fp32 or the latents' wider dtype.

        Args:
            x_BCTHW: latents at the noise level of `timestep`.
            timestep: 1000·sigma in training, the scheduler's own (an integer for UniPC) in sampling; never in bf16.
                [B], [B, N] with one per token, or the few distinct ones of a sequence.
            text: features [B, L, D]; a list of each sample's without padding; rows without most of their padding; or a
                generation's prompt, of which is kept what every step would recompute.
            condition_BCTHW: I2V's mask and image channels [B, 20, T, H, W], None for T2V.
            first_block_cache: lets a step of a generation keep the residual of an earlier one, approximately.
        """
        dtype = self.dtype
        hidden = x_BCTHW if condition_BCTHW is None else torch.cat([x_BCTHW, condition_BCTHW.to(x_BCTHW)], dim=1)
        hidden = hidden.to(dtype)
        if isinstance(text, Prompt):
            out = predict(self.transformer, self.options, hidden, timestep, self._cached(text), first_block_cache)
        else:
            features = _in_dtype(text, dtype)
            if self.options.diffusers_forward:
                out = self._diffusers_forward(hidden, timestep, features)
            else:
                out = predict(self.transformer, self.options, hidden, timestep, features, first_block_cache)
        return out.to(torch.promote_types(x_BCTHW.dtype, torch.float32))

    def _diffusers_forward(
        self, hidden_BCTHW: Tensor, timestep: Tensor | TokenTimes, text: Tensor | Sequence[Tensor] | TextRows
    ) -> Tensor:
        assert not isinstance(text, TextRows)
        features = text if isinstance(text, Tensor) else pad_text(text)
        timestep = timestep.per_token() if isinstance(timestep, TokenTimes) else timestep
        out: Tensor = self.transformer(hidden_BCTHW, timestep, features, return_dict=False)[0]
        return out

    def _cached(self, prompt: Prompt) -> PromptCache:
        """What this backbone has computed from a prompt; created at its first evaluation."""
        if prompt not in self._prompts:
            if prompt.batch is None:
                rows = _in_dtype(prompt.text, self.dtype)
                assert isinstance(rows, TextRows)
                self._prompts[prompt] = PromptCache(rows.embedded(self.transformer))
            else:
                self._prompts[prompt] = self._cached(prompt.batch).first(len(prompt.text.rows_BMD))
        return self._prompts[prompt]

    def forget_prompts(self) -> None:
        """Free what was computed from prompts, when another noise expert takes over or the weights change."""
        self._prompts.clear()

    def compile(self, on: bool = True) -> None:
        """Run the blocks compiled (or eagerly) from now on; they are compiled at first use."""
        self.options.block = compiled_block() if on else block_forward
        self.options.selective = compiled_block(selective=True) if on else None

    def checkpoint(self, kind: Checkpointing, whole_blocks: int = 0) -> None:
        """Choose what a backward recomputes.

        Args:
            kind: see `ForwardOptions`.
            whole_blocks: see `ForwardOptions`.
        """
        self.options.checkpointing, self.options.whole_blocks = kind, whole_blocks
        if self.options.diffusers_forward and kind == "block":
            self.transformer.enable_gradient_checkpointing()

    def stream(self, residency: Residency | None) -> None:
        """Ask `residency` for each block's weights; None: they are on the device."""
        self.options.residency = residency

    def share_tokens(self, context_parallel: ContextParallel | None) -> None:
        """Share each sequence's tokens with other processes; None: compute all of them here."""
        self.options.context_parallel = context_parallel

    def use_diffusers_forward(self) -> None:
        """Run diffusers' own forward from now on, with the same activation checkpointing: FSDP needs it."""
        self.options.diffusers_forward = True
        self.checkpoint(self.options.checkpointing, self.options.whole_blocks)


def _in_dtype(
    text: Tensor | Sequence[Tensor] | TextRows, dtype: torch.dtype
) -> Tensor | Sequence[Tensor] | TextRows:
    if isinstance(text, Tensor):
        return text.to(dtype)
    if isinstance(text, TextRows):
        return replace(text, rows_BMD=text.rows_BMD.to(dtype))
    return [features.to(dtype) for features in text]
