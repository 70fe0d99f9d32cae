"""The kinds of row that bench_speed.py measures: forwards, steps, videos, peers."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from bench_plan import write_cache
from speed_measure import GIB, Results, forward_flops, measure, row_of, seconds_of, step_flops
from speed_model import (
    A14B,
    EXPERT,
    LATENTS,
    PIXELS,
    SMALL,
    inputs,
    lora_trainer,
    mixture_trainer,
    random_model,
    shape_folder,
    spoken,
    step,
    targets,
)

from lapwan.memory.generation import GenerationWorkload, plan_generation
from lapwan.memory.plan import MemoryPlan
from lapwan.memory.streaming import offload_backbone, tensors_of
from lapwan.memory.throughput import measure_throughput
from lapwan.memory.training import plan_training
from lapwan.models.base import Base
from lapwan.models.device import free_bytes
from lapwan.models.spec import read_spec
from lapwan.names import NoiseExpert, Precision
from lapwan.sampling.denoise import Conditions, Guidance, denoise
from lapwan.sampling.scheduler import Grid, Step
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.train.recipe import read_data, workload
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.linears import Fp8Linear
from lapwan.wan.quantise.load import Recipe

NEGATIVE_WORDS = 126  # of Wan's own negative prompt
CONTEXT = 1.0  # GiB a process takes on a card beside what torch allocates


class Bench:
    """Holds the one model in memory; rows ask for theirs."""

    def __init__(self, results: Results, device: torch.device, tiny: bool, seconds: float) -> None:
        self.results, self.device, self.tiny, self.seconds = results, device, tiny, seconds
        self._made: tuple[str, object] | None = None

    def size(self, name: str) -> str:
        return "small" if self.tiny else name

    def model(self, kind: str):
        """bf16, fp8 (all blocks) or mixed (fp8 but the last eight); compiled, unless tiny."""
        if self._made is None or self._made[0] != kind:
            self.drop()
            config = SMALL if self.tiny else A14B
            count = int(config["num_layers"])
            quantised = {"bf16": 0, "fp8": count, "mixed": count - self.last}[kind]
            model = random_model(self.device, config, range(quantised))
            model.compile(not self.tiny)
            self._made = kind, model
        return self._made[1]

    @property
    def last(self) -> int:
        return 2 if self.tiny else 8

    def drop(self) -> None:
        self._made = None
        self.free()

    def free(self) -> None:
        gc.collect()  # adapters and transformers hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def plan(self, kind: str, size: str, steps: int, free_gib: float, memory: str) -> MemoryPlan:
        """What `generate` would decide for the denoising of a video with so much free."""
        frames, height, width = PIXELS[self.size(size)]
        with tempfile.TemporaryDirectory() as folder:
            shape_folder(Path(folder) / "model", SMALL if self.tiny else A14B)
            return plan_generation(
                read_spec(Path(folder) / "model"), {}, torch.bfloat16, Recipe(Precision.FP8) if kind == "fp8" else None,
                GenerationWorkload(frames, (height, width), steps), memory, int(free_gib * GIB),
                measure_throughput(self.device, torch.bfloat16), 0)

    def step_plan(self, model: WanBackbone, size: str, last: int, limit: float | None) -> MemoryPlan:
        """What train-lora would decide for one noise expert, below `limit` GiB or with what is free besides it.

        Stage 2's four experts of rank 4 take what a LoRA of rank 16 takes.
        """
        with tempfile.TemporaryDirectory() as made:
            folder, cache = Path(made) / "model", Path(made) / "clips"
            shape_folder(folder, SMALL if self.tiny else A14B)
            write_cache(cache, folder, self.size(size))
            fp8 = any(isinstance(block.ffn.net[2], Fp8Linear) for block in model.transformer.blocks)
            if limit is None and self.device.type == "cuda":
                limit = (sum(t.nbytes for t in tensors_of(model.transformer)) + (free_bytes(self.device) or 0)) / GIB
            settings = TrainLoraSettings.model_validate({
                "model": str(folder), "output": "unused", "data": {"cache": cache}, "steps": 10,
                "dtype": "fp8" if fp8 else "auto", "noise_experts": [EXPERT], "memory": limit or "auto",
                "compile": "off" if self.tiny else "on"})
            base = Base(read_spec(folder))
            work = workload(read_data(settings, base), base, {EXPERT: [targets(model, last, 16)]})
            return plan_training(settings, base, work, self.device, predict=True).plan

    def tokens(self, size: str) -> int:
        t, h, w = LATENTS[self.size(size)]
        return t * (h // 2) * (w // 2)


def forward_row(name: str, kind: str, size: str, target: str = "", compiled: bool = True) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        model = bench.model(kind)
        model.compile(compiled and not bench.tiny)
        work = partial(torch.no_grad()(model.velocity), *spoken(model, bench.size(size)))
        bench.results.add(measure(
            name, work, forward_flops(model.transformer, bench.tokens(size)), bench.seconds, target=target,
        ))
        model.compile(not bench.tiny)
    return run


def peer_row(name: str, size: str) -> Callable[[Bench], None]:
    """diffusers' own forward over the same weights, eager and with its `compile_repeated_blocks`."""
    def run(bench: Bench) -> None:
        model = bench.model("bf16")
        x, t, text = inputs(model, bench.size(size))
        work = partial(torch.no_grad()(model.transformer), x.bfloat16(), t, text, return_dict=False)
        flops = forward_flops(model.transformer, bench.tokens(size))
        bench.results.add(measure(f"{name}_eager", work, flops, bench.seconds))
        if not bench.tiny:
            model.transformer.compile_repeated_blocks(fullgraph=True)
            bench.results.add(measure(name, work, flops, bench.seconds, note="compile_repeated_blocks"))
            for block in model.transformer.blocks:
                block._compiled_call_impl = None
    return run


def adapted_forward_row(name: str, kind: str, size: str) -> Callable[[Bench], None]:
    """A forward with a LoRA in rank space on every Linear: what folding it into the weights would save."""
    def run(bench: Bench) -> None:
        model = bench.model(kind)
        _, adapted = lora_trainer(model, bench.size(size), len(model.transformer.blocks), rank=32)
        work = partial(torch.no_grad()(model.velocity), *spoken(model, bench.size(size)))
        flops = forward_flops(model.transformer, bench.tokens(size))
        bench.results.add(measure(name, work, flops, bench.seconds, note="rank 32 on all 400 Linears"))
        adapted.off()
    return run


def step_row(
    name: str, kind: str, size: str, target: str, last: int | None = 8, checkpointing: str | None = None,
    mixture: bool = False,
) -> Callable[[Bench], None]:
    """Without recomputation if none is named; a card that does not hold that recomputes blocks, and the row says so."""
    def attempt(bench: Bench, strategy: str) -> None:
        bench.free()  # of the trainer of a row before
        model = bench.model(kind)
        count = len(model.transformer.blocks) if last is None else bench.last
        model.checkpoint(strategy)
        make = mixture_trainer if mixture else lora_trainer
        trainer, adapted = make(model, bench.size(size), count)
        try:
            bench.results.add(measure(
                name, lambda: step(trainer), step_flops(model.transformer, bench.tokens(size), count), bench.seconds,
                target=target, note=f"checkpointing {strategy}",
            ))
        finally:
            adapted.off()
            model.checkpoint("off")

    def run(bench: Bench) -> None:
        for strategy in (checkpointing,) if checkpointing else ("off", "block"):
            try:
                return attempt(bench, strategy)
            except torch.OutOfMemoryError as error:
                if strategy == "block":
                    raise
                print(f"{name}: {str(error).splitlines()[0][:120]}; recomputing blocks instead", flush=True)
            bench.free()
    return run


def mixture_against_lora(name: str, kind: str, size: str) -> Callable[[Bench], None]:
    """Steps of both in turn on one base; the ratio of each pair, and a 95 % interval of its mean by the pairs."""
    def run(bench: Bench) -> None:
        model, made = bench.model(kind), {}
        for title, make in (("lora", lora_trainer), ("moe", mixture_trainer)):
            made[title] = make(model, bench.size(size), bench.last)
            made[title][1].off()
        times: dict[str, list[float]] = {"lora": [], "moe": []}
        pairs = 6 if bench.tiny else 26
        for pair in range(pairs + 3):
            for title in ("lora", "moe") if pair % 2 else ("moe", "lora"):
                trainer, adapted = made[title]
                adapted.on()
                taken = seconds_of(lambda trainer=trainer: step(trainer))
                adapted.off()
                if pair >= 3:
                    times[title].append(taken)
        ratios = torch.tensor(times["moe"]) / torch.tensor(times["lora"])
        half = 1.96 * float(ratios.std()) / len(ratios) ** 0.5
        mean = float(ratios.mean())
        note = f"moe / lora = {mean:.4f} ± {half:.4f} (95 %, {len(ratios)} pairs), medians " + ", ".join(
            f"{title} {sorted(own)[len(own) // 2]:.4f} s" for title, own in times.items())
        row = row_of(name, times["moe"], None, 0.0, {}, "≤ 1.03", note)
        row.extra = {"ratio": mean, "half_interval": half}
        bench.results.add(row)
    return run


class _Euler:
    """The solver of the video rows: x += (σ' − σ)·v."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._sigmas, self._at = list(sigmas), 0

    def step(self, v: torch.Tensor, timestep: torch.Tensor, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self._at += 1
        return (x + (self._sigmas[self._at] - self._sigmas[self._at - 1]) * v,)


def video_row(
    name: str, kind: str, size: str, target: str, cap: float | None = None, memory: str = "auto", steps: int = 40,
) -> Callable[[Bench], None]:
    """The denoising of a video with guidance, as `generate` plans and does it, under the memory of a card of `cap` GiB.

    Two steps go before; a video is 2 · `steps` evaluations, so one is measured where it takes longer than a row may.
    """
    def run(bench: Bench) -> None:
        plan = None if cap is None else bench.plan(kind, size, steps, cap - CONTEXT, memory)
        streamed = range(0) if plan is None else plan.streamed
        model = bench.model(kind)
        offload = offload_backbone(model, (), bench.device, streamed) if streamed else None
        if offload is not None:
            offload.onload()
        x, _, text = inputs(model, bench.size(size))
        negative = torch.zeros_like(text)
        negative[:, :NEGATIVE_WORDS] = torch.randn_like(negative[:, :NEGATIVE_WORDS])
        conditions = Conditions(text, negative)
        sigmas = [1 - i / steps for i in range(steps + 1)]
        points = tuple(Step(torch.tensor(1000 * s), s, EXPERT) for s in sigmas[:-1])

        def work(first: int = steps) -> None:
            grid = Grid(_Euler(sigmas), points[:first])
            denoise(grid, x, conditions, Guidance({NoiseExpert.HIGH: 4.0}), lambda e: model, lambda s: nullcontext(),
                    batched_guidance=plan is None or plan.strategy.batched_guidance)

        with _capped(bench.device, cap):
            flops = forward_flops(model.transformer, bench.tokens(size)).times(2 * steps)
            work(2)
            row = measure(name, work, flops, bench.seconds, least=1, warm=0, target=target, note=f"{steps} steps")
        if plan is not None:
            batches = "one batch" if plan.strategy.batched_guidance else "two"
            row.note += (f", {len(streamed)} blocks streamed, guidance in {batches}, predicted "
                         f"{plan.peak / GIB:.2f} GiB, {steps * plan.strategy.seconds:.1f} s")
            row.extra |= {"predicted_gib": plan.peak / GIB, "predicted_seconds": steps * plan.strategy.seconds}
        bench.results.add(row)
        if offload is not None:
            offload.offload()
            bench.drop()
    return run


def planned_step_row(
    name: str, kind: str, size: str, target: str, last: int | None = 8, mixture: bool = False,
    cap: float | None = None, memory: float | None = None,
) -> Callable[[Bench], None]:
    """A step as lapwan plans it: on a card of `cap` GiB (absent: this one), below `memory` GiB where that is asked."""
    def run(bench: Bench) -> None:
        bench.free()
        model = bench.model(kind)
        count = len(model.transformer.blocks) if last is None else bench.last
        limit = memory if memory is not None or cap is None else cap - CONTEXT
        plan = bench.step_plan(model, size, count, limit)
        model.checkpoint(plan.strategy.checkpointing, plan.strategy.whole_blocks)
        trainer, adapted = (mixture_trainer if mixture else lora_trainer)(model, bench.size(size), count)
        offload = offload_backbone(model, adapted.adapter.adapter_tensors(), bench.device, plan.streamed)
        offload.onload()
        asked = "" if limit is None else f"asked for {limit:g} GiB: "
        note = (f"{asked}{len(plan.streamed)} blocks streamed, recomputing {plan.strategy.checkpointing} and "
                f"{plan.strategy.whole_blocks} blocks, predicted {plan.peak / GIB:.2f} GiB, "
                f"{plan.strategy.seconds:.3g} s")
        with _capped(bench.device, cap):
            flops = step_flops(model.transformer, bench.tokens(size), count)
            row = measure(name, lambda: step(trainer), flops, bench.seconds, target=target, note=note)
        row.extra |= {"predicted_gib": plan.peak / GIB, "predicted_seconds": plan.strategy.seconds}
        bench.results.add(row)
        offload.offload()
        bench.drop()
    return run


class _capped:
    """torch may take no more than a card of `cap` GiB would leave it."""

    def __init__(self, device: torch.device, cap: float | None) -> None:
        self._on = device.type == "cuda" and cap is not None
        self._cap = cap or 0.0

    def _set(self, fraction: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(fraction)

    def __enter__(self) -> None:
        if self._on:
            self._set(min(1.0, (self._cap - CONTEXT) * GIB / torch.cuda.get_device_properties(0).total_memory))

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._set(1.0)
