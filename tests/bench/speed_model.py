"""A14B-shaped transformers with random weights made on the device, and trainers of lapwan's own over them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor

from lapwan.caching.collate import Batch
from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.data.taxonomy import load_taxonomy
from lapwan.lora.attach import Adapter, Group, attach, initial_state
from lapwan.lora.state import AdapterState
from lapwan.lora.targets import TargetRule, resolve_targets
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.names import Band, NoiseExpert, Precision
from lapwan.settings.optimizers import AdamWSettings, ScheduleSettings
from lapwan.tiny.model import tiny_folder
from lapwan.train.lora.objective import LORA_GROUP, LoraObjective
from lapwan.train.moe.objective import MixtureObjective, MixtureWeights
from lapwan.train.objective import Objective, SigmaRule
from lapwan.train.optimizers import ScheduledOptimizer, make_optimizer, make_schedule
from lapwan.train.parallel import Distributed
from lapwan.train.sample_order import SampleOrder
from lapwan.train.trainer import Trainer
from lapwan.train.trainer_config import TrainerConfig
from lapwan.train.training_data import DataStream, TrainingData
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.load import fill, linears_of

A14B = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40,
}
SMALL = {**A14B, "num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 256, "num_layers": 4}
LATENTS = {  # 81 frames at 256x256 and 480x832, 121 of TI2V-5B at 480x832
    "256": (21, 32, 32), "480": (21, 60, 104), "small": (3, 8, 8), "5b_480": (31, 30, 52), "5b_small": (5, 4, 6)}
PIXELS = {"256": (81, 256, 256), "480": (81, 480, 832), "small": (9, 64, 64)}
WORDS = 60  # rows of a caption
BAND = Band(0.875, 1.0)
EXPERT = NoiseExpert.HIGH


def _random(shape: tuple[int, ...], name: str, device: torch.device) -> Tensor:
    if name.endswith(("norm_q.weight", "norm_k.weight", "norm2.weight")):
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    scale = 0.02 if len(shape) < 2 else math.prod(shape[1:]) ** -0.5
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * scale


def random_model(
    device: torch.device, config: dict[str, object] = A14B, quantised: Iterable[int] = (),
    precision: Precision = Precision.FP8,
) -> WanBackbone:
    """Random weights in bf16 (fp32 where Wan keeps it), `quantised` blocks in a `precision`; made tensor by tensor."""
    with init_empty_weights():  # buffers (the rope tables) are made for real
        model = WanTransformer3DModel(**config)
    wide = tuple(model._keep_in_fp32_modules)

    def cast(name: str, stored: Tensor) -> Tensor:
        return stored.to(torch.float32 if any(part in wide for part in name.split(".")) else torch.bfloat16)

    torch.manual_seed(0)
    source = {n: partial(_random, p.shape, n, device) for n, p in model.named_parameters()}
    full = frozenset(range(len(model.blocks))) - frozenset(quantised)
    fill(model, source, linears_of(model.blocks, "blocks", full), precision, cast, device, None)
    model.requires_grad_(False)
    return WanBackbone(model.eval().to(device))


def shape_folder(folder: Path, config: dict[str, object]) -> None:
    """The embedded model's folder with other transformers in it, headers over holes: for what only asks for shapes."""
    shutil.copytree(tiny_folder("t2v"), folder)
    for noise_expert in NoiseExpert:
        own = folder / noise_expert.component
        shutil.rmtree(own)
        with init_empty_weights():
            model = WanTransformer3DModel(**config)
        model.save_config(own)
        _sparse(own / "diffusion_pytorch_model.safetensors", {n: tuple(p.shape) for n, p in model.named_parameters()})


def _sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bf16 whose data is a hole: its header is read, its numbers never."""
    at, header = 0, {}
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def inputs(model: WanBackbone, size: str, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and text features (512 rows, `WORDS` of them not zero)."""
    device, dim = next(model.transformer.parameters()).device, model.transformer.config.text_dim
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, 16, *LATENTS[size], device=device, generator=generator)
    text = torch.zeros(batch, 512, dim, device=device, dtype=torch.bfloat16)
    text[:, :WORDS] = torch.randn(batch, WORDS, dim, device=device, generator=generator)
    return x, torch.full((batch,), 937.5, device=device), text


def spoken(model: WanBackbone, size: str, batch: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same with the texts as training has them, without their padding."""
    x, t, text = inputs(model, size, batch)
    return x, t, [one[:WORDS] for one in text]


class Adapted:
    """An adapter that can be put on and taken off, so that two share one base."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.layers = dict(adapter.layers)

    def off(self) -> None:
        """Plain Linears again."""
        self._set({path: layer.base for path, layer in self.layers.items()})

    def on(self) -> None:
        """The adapter's layers again."""
        self._set(self.layers)

    def _set(self, modules: dict[str, torch.nn.Module]) -> None:
        for path, module in modules.items():
            self.adapter.transformer.set_submodule(path, module)


def targets(model: WanBackbone, last: int, rank: int) -> dict[str, int]:
    """Every Linear of the last blocks."""
    return resolve_targets([TargetRule(last, dict.fromkeys(PROJECTIONS, rank))], len(model.transformer.blocks))


def _state(model: WanBackbone, last: int, rank: int, *key: str) -> AdapterState:
    state = initial_state(model.transformer, targets(model, last, rank), None, 0, *key)
    for entry in state.entries.values():
        entry.up.normal_(std=1e-3)  # a step of a run, not the first one
    return state


def lora_trainer(
    model: WanBackbone, size: str, last: int, rank: int = 16, first_frame: float = 0.0
) -> tuple[Trainer, Adapted]:
    """A plain LoRA on every Linear of the last blocks; `first_frame`: share of draws with a clean first frame."""
    adapter = attach(model.transformer, [Group(LORA_GROUP, _state(model, last, rank), True)])
    objective = LoraObjective({EXPERT: model}, {EXPERT: adapter}, {EXPERT: {}}, roi_weight=3.0)
    return _trainer(objective, model, size, first_frame=first_frame), Adapted(adapter)


def mixture_trainer(model: WanBackbone, size: str, last: int, rank: int = 4) -> tuple[Trainer, Adapted]:
    """Four experts on the same Linears with a text router and a timestep gate: stage 2 as train-moe builds it."""
    taxonomy = load_taxonomy("surgical4")
    spec = MixtureSpec(
        families=taxonomy.keys, taxonomy=taxonomy.to_dict(), task="t2v", bands={EXPERT: (BAND.low, BAND.high)},
        text_dim=model.transformer.config.text_dim,
    )
    mixture = Mixture(spec, {EXPERT: {family: _state(model, last, rank, family) for family in taxonomy.keys}})
    mixture.to(next(model.transformer.parameters()).device)
    adapter = attach(model.transformer, mixture.groups(EXPERT, None, trainable=True), gates_required=True)
    objective = MixtureObjective(mixture, {EXPERT: model}, {EXPERT: adapter}, MixtureWeights(), "bench", {})
    return _trainer(objective, model, size), Adapted(adapter)


def _batch(model: WanBackbone, size: str, clip: int) -> Batch:
    device, dim = next(model.transformer.parameters()).device, model.transformer.config.text_dim
    channels = model.transformer.config.out_channels
    generator = torch.Generator(device).manual_seed(clip)
    shape = LATENTS[size]
    roi = torch.zeros(1, *shape, device=device)
    roi[..., : shape[1] // 2, : shape[2] // 2] = 1
    return Batch(
        ids=(f"clip{clip}",), latents_BCTHW=torch.randn(1, channels, *shape, device=device, generator=generator),
        text=(torch.randn(WORDS, dim, device=device, generator=generator).bfloat16(),), condition_BCTHW=None,
        label_weights_BE=torch.tensor([[0.0, 0.65, 0.0, 0.35]], device=device),
        fallback_B=torch.tensor([False], device=device), roi_BTHW=roi,
    )


def _trainer(
    objective: Objective, model: WanBackbone, size: str, clips: int = 8, first_frame: float = 0.0
) -> Trainer:
    batches = [_batch(model, size, clip) for clip in range(clips)]
    optimizers = {n: make_optimizer(AdamWSettings(), groups) for n, groups in objective.parameter_groups.items()}
    scheduled = {n: ScheduledOptimizer(o, make_schedule(ScheduleSettings(), o, 10_000)) for n, o in optimizers.items()}
    streams = {EXPERT: DataStream(SampleOrder([0] * clips, 1, 0, "high"), SigmaRule(band=BAND))}
    data = TrainingData(streams, lambda indices: batches[indices[0]], [f"clip{i}" for i in range(clips)], seed=0,
                        first_frame=first_frame)
    return Trainer(objective, data, [EXPERT] * 10_000, scheduled, TrainerConfig(Path("unused")))


def share_steps(trainer: Trainer, distributed: Distributed, accumulate: int = 1) -> None:
    """Take the next steps in these processes, with `accumulate` batches each."""
    data = trainer.data
    trainer.data = TrainingData(data.streams, data.load_batch, data.item_ids, 0, accumulate, distributed=distributed)
    trainer.distributed = distributed


def step(trainer: Trainer) -> None:
    """One optimizer step, as `Trainer.fit` takes it, without writing metrics."""
    trainer._optimizer_step(EXPERT)
    trainer.step += 1
    trainer._logs[EXPERT].__init__()
