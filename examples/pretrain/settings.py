"""Every number of the pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lapwan.names import NoiseExpert
from lapwan.tiny.model import A14B, EMBEDDED, TRANSFORMER, EmbeddedParts

SEED = 20220722

# Wider than a token's 48·2·2 noisy values, all of which the velocity contains.
TRANSFORMER_5B: dict[str, Any] = {
    **TRANSFORMER, "attention_head_dim": 56, "out_channels": 48, "ffn_dim": 256, "num_layers": 5,
}
# Wan2.2's VAE in all but its widths: 2x2 pixels become channels first, so 192x192 is 96x96 inside.
VAE_5B: dict[str, Any] = {
    "base_dim": 8, "decoder_base_dim": 12, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
    "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
}
TI2V_5B = EmbeddedParts(VAE_5B, TRANSFORMER_5B, "vae_5b.safetensors", "latents_5b.json",
                        {NoiseExpert.HIGH: "transformer_5b.safetensors"})


@dataclass(frozen=True)
class VaeSettings:
    """Of the autoencoder."""

    clips: int = 20_000
    steps: int = 6_200
    batch: int = 24  # of crops
    whole_batch: int = 12
    whole_every: int = 3  # every third step sees whole clips, the others crops around the instrument's head
    crop: int = 64  # pixels; all frames
    first_clips: int = 1_500  # training starts with as many and sees `clips_per_step` more at every step
    clips_per_step: float = 8.0
    lr: float = 1.5e-3
    warmup: int = 200
    ema: float = 0.998
    head_weight: float = 6.0  # added to 1 inside the box around the head
    square_weight: float = 2.0
    edge_weight: float = 1.0
    edge_warmup: int = 1_000
    bf16: bool = True
    kl_weight: float = 2e-4
    sampled_statistics: bool = False  # the latents' deviation includes the encoder's own noise
    compiled: bool = True  # takes two minutes


@dataclass(frozen=True)
class DiffusionSettings:
    """Of the noise experts, and of the text encoder where it is trained."""

    clips: int = 48_000
    steps: int = 6_500
    batch: int = 256
    first_clips: int = 6_000
    clips_per_step: float = 6.0
    lr: float = 1.2e-3
    text_lr: float = 6e-4
    warmup: int = 400
    weight_decay: float = 0.01
    ema: float = 0.9985
    condition_dropout: float = 0.5  # text-to-video: mask and image channels exactly zero
    caption_dropout: float = 0.1  # half of them the empty caption, half the official negative prompt
    head_weight: float = 3.0
    shifts: dict[str, float] = field(default_factory=lambda: {"high": 1.0, "low": 2.0})
    bands: dict[str, tuple[float, float]] = field(default_factory=lambda: {"high": (0.875, 1.0), "low": (0.0, 0.9)})
    train_text: bool = True
    bf16_latents: bool = False  # the autoencoder's products in bf16
    mirrors: int = 1  # of a clip that are trained on: 4: mirrored across, upside down, and both


@dataclass(frozen=True)
class EvaluatorSettings:
    """Of the instrument classifier with its tip detector."""

    clips: int = 3_000
    checks: int = 400
    steps: int = 2_000
    batch: int = 128  # frames
    lr: float = 2e-3


@dataclass(frozen=True)
class JudgeSettings:
    """Of the second judge: clips that train by kind, `tests` of each kind to calibrate on and as many to test on."""

    one: int = 3_000
    two: int = 1_500
    empty: int = 1_500
    early: int = 640
    broken: int = 640
    tests: int = 500
    steps: int = 4_000
    batch: int = 128  # frames
    lr: float = 2e-3


@dataclass(frozen=True)
class Recipe:
    """An embedded model to pretrain: its parts, the size and fps of its clips, and the settings of each stage.

    `guidance` of the reports: text to video, and from a first frame. `stages` are those of `--stage all`.
    """

    parts: EmbeddedParts
    in_channels: int
    size: int
    fps: float
    vae: VaeSettings
    diffusion: DiffusionSettings
    stages: tuple[str, ...]
    guidance: tuple[float, float] = (3.5, 2.0)
    headroom: tuple[tuple[str, int, int, float], ...] = (  # name, LoRAs, rank, lr
        ("plain", 1, 1, 1e-3), ("plain", 1, 2, 3e-3), ("chosen", 4, 2, 3e-3))

    @property
    def clean_first_frame(self) -> bool:
        """Whether an image is the first latent frame of x, not in channels of its own."""
        return self.in_channels == self.parts.latent_channels


RECIPES = {
    "tiny": Recipe(A14B, 36, EMBEDDED["i2v"].size, 16.0, VaeSettings(), DiffusionSettings(),
                   ("vae", "evaluator", "diffusion", "samples", "headroom", "judge")),
    # The text encoder and the evaluator are those of `tiny`. One transformer for all noise, so that more of its steps
    # are at high noise, where sampling with shift 5 spends them.
    "tiny-5b": Recipe(
        TI2V_5B, 48, 192, 24.0,
        VaeSettings(clips=16_000, steps=4_000, crop=128, batch=16, whole_batch=6, first_clips=256, warmup=100,
                    edge_warmup=500, kl_weight=1e-3, sampled_statistics=True, compiled=False),
        DiffusionSettings(clips=16_000, steps=8_000, batch=256, first_clips=256, lr=1.5e-3, warmup=200,
                          shifts={"high": 4.0}, bands={"high": (0.0, 1.0)}, train_text=False, bf16_latents=True,
                          mirrors=4),
        ("vae", "diffusion", "samples", "headroom"), guidance=(3.0, 3.0), headroom=(("plain", 1, 2, 3e-3),)),
}

S = TypeVar("S", VaeSettings, DiffusionSettings, EvaluatorSettings, JudgeSettings)


def shorter(settings: S, scale: float) -> S:
    """The same settings at `scale` of their length, for a trial run."""
    names = [name for name in ("clips", "steps", "first_clips", "checks", "warmup", "one", "two", "empty", "early",
                          "broken", "tests") if name in vars(settings)]
    return replace(settings, **{name: max(8, round(vars(settings)[name] * scale)) for name in names})
