"""What of Wan2.2 T2V-A14B fits into a given memory: the plans of training and generation, without a checkpoint.

The shapes are those of Wan-AI/Wan2.2-T2V-A14B-Diffusers; only configs and a hole of the VAE's size are written, to a
temporary folder, since plans read them from a model's folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lapwan.memory.generation import GenerationWorkload, plan_generation
from lapwan.memory.plan import GIB, RING_SLOTS, MemoryPlan, Throughput, required_bytes
from lapwan.memory.training import Workload, predict_training
from lapwan.models.base import Base, target_ranks
from lapwan.models.spec import T2V_A14B, ModelSpec
from lapwan.names import NoiseExpert, Precision
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer.compile import compiling_saves

RANK, LAST_BLOCKS, EXPERTS, STEPS, FRAMES = 16, 8, 4, 1000, 81
SIZES = ((256, 256), (480, 832))
DTYPES = ("bf16", "fp8", "nf4")
WORKS = ("train-lora", "train-moe", "generate")

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 40,
    "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
    "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
    "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024,
}
_WIDTH = _TRANSFORMER["num_attention_heads"] * _TRANSFORMER["attention_head_dim"]
_VAE_NUMBERS = 126_892_531  # of Wan2.1_VAE.pth, in fp32
# umT5-XXL's encoder in bf16: the embedding, and one of its 24 blocks.
_TEXT_OUTER, _TEXT_BLOCK, _TEXT_BLOCKS = 2 * 256_384 * 4096, 2 * (4 * 4096 * 4096 + 3 * 4096 * 10240), 24

# Of a consumer's GPU, such as an RTX 4090, where there is none to measure: it only decides which strategy is fastest.
NOMINAL = Throughput(matmul=1.2e14, matmul_fp8=1.9e14, attention=1.1e14, bus=2.5e10)


@dataclass(frozen=True)
class Fit:
    """The plan of one kind of work. `fits` also asks for the host memory that offloaded weights take."""

    work: str
    size: tuple[int, int]
    dtype: str
    plan: MemoryPlan

    @property
    def fits(self) -> bool:
        """Whether device and host have enough."""
        return self.plan.fits and self.plan.fits_host

    @property
    def needed(self) -> int:
        """Bytes that must be free on the device, slack included."""
        return required_bytes(self.plan.peak)

    @property
    def where(self) -> str:
        """Where the noise experts are, in a few words."""
        placement = self.plan.strategy.placement
        if placement.streamed:
            return f"{placement.streamed} blocks streamed"
        return "both resident" if placement.both else "one at a time"

    @property
    def recomputed(self) -> str:
        """What a backward recomputes: none, op (cheap operations), some (of the trained blocks) or block (all)."""
        strategy = self.plan.strategy
        if strategy.whole_blocks:
            return "some"
        return "none" if strategy.checkpointing == "off" else strategy.checkpointing


@contextmanager
def _released_model() -> Iterator[ModelSpec]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for noise_expert in NoiseExpert:
            (folder / noise_expert.component).mkdir()
            (folder / noise_expert.component / "config.json").write_text(json.dumps(_TRANSFORMER), encoding="utf-8")
        vae = folder / "vae"
        vae.mkdir()
        (vae / "config.json").write_text(json.dumps({"base_dim": 96, "z_dim": 16}), encoding="utf-8")
        size = 4 * _VAE_NUMBERS
        header = json.dumps({"vae": {"dtype": "F32", "shape": [_VAE_NUMBERS], "data_offsets": [0, size]}}).encode()
        with (vae / "diffusion_pytorch_model.safetensors").open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + size)  # a hole: it takes no disk
        yield ModelSpec(folder, T2V_A14B, tuple(NoiseExpert), 0.875, 16, 16, _TRANSFORMER["num_layers"], 4096, 12.0, 4,
                        8, 16, T2V_A14B.defaults)


def what_fits(free: int, host_free: int | None, rates: Throughput) -> Iterator[Fit]:
    """A plan for each work of `WORKS`, size of `SIZES` and dtype of `DTYPES`, in that order.

    The recipe: LoRAs of rank 16 in the last 8 blocks of both noise experts, four experts of that rank in a mixture,
    1000 steps of one clip of 81 frames; a video of 40 steps with guidance.

    Args:
        free: bytes free on the device.
        host_free: bytes available in host memory; None: unknown.
        rates: the device's throughput.
    """
    with _released_model() as spec:
        for work in WORKS:
            for size in SIZES:
                for dtype in DTYPES:
                    plan = (_generation(spec, size, dtype, free, host_free, rates) if work == "generate" else
                            _training(spec, work, size, dtype, free, host_free, rates))
                    yield Fit(work, size, dtype, plan)


def _training(
    spec: ModelSpec, work: str, size: tuple[int, int], dtype: str, free: int, host_free: int | None, rates: Throughput
) -> MemoryPlan:
    kind, experts = (TrainLoraSettings, 1) if work == "train-lora" else (TrainMoeSettings, EXPERTS)
    settings = kind.model_validate({
        "output": "unused", "data": {"cache": "unused"}, "steps": STEPS, "dtype": dtype, "rank": RANK,
        "targets": f"last_{LAST_BLOCKS}"})
    ranks = target_ranks(settings.targets, spec.num_layers)
    workload = Workload((FRAMES, *size), 0, STEPS, {noise_expert: [ranks] * experts for noise_expert in NoiseExpert})
    tokens = ((FRAMES - 1) // 4 + 1) * (size[0] // 16) * (size[1] // 16)
    compiled = compiling_saves(_WIDTH, tokens, STEPS, training=True)
    return predict_training(settings, Base(spec), workload, torch.bfloat16, free, rates, compiled, host_free)


def _generation(
    spec: ModelSpec, size: tuple[int, int], dtype: str, free: int, host_free: int | None, rates: Throughput
) -> MemoryPlan:
    recipe = None if dtype == "bf16" else Recipe(Precision(dtype))
    whole = _TEXT_OUTER + _TEXT_BLOCKS * _TEXT_BLOCK
    text = whole if required_bytes(whole) <= free else _TEXT_OUTER + RING_SLOTS * _TEXT_BLOCK
    workload = GenerationWorkload(FRAMES, size)
    return plan_generation(spec, {}, torch.bfloat16, recipe, workload, "auto", free, rates, text, host_free)


def gib(size: int) -> float:
    """Bytes in GiB."""
    return size / GIB
