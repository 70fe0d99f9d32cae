"""TI2V-5B at its full size: through the command line, and training steps beside diffusers + peft in one process.

    python tests/bench/bench_5b.py --work FOLDER -o 5b.md [--seconds 500]
    python tests/bench/bench_5b.py --work FOLDER -o 5b.md --small      # the same code on a CPU, small shapes

`--work` gets a model of random weights in the released layout (24 GB) and four clips: 480x832, 121 frames, 24 a
second. Command rows are processes of their own, with what the process says of its plan and `nvidia-smi` of its GPU
(half a GiB is the context of this process). In the rows of steps the same weights are in lapwan's transformer and in
diffusers' own, each with a LoRA of rank 32 on every Linear of all blocks; both take their steps in turn, and both
models' weights count in the peaks. diffusers gets a timestep for each token, as its pipeline for this model gives
them, and runs eagerly in bf16 autocast with fused AdamW, as peft's users write it. Speed and memory only: random
weights say nothing of quality.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from rehearsal import Row, run_row
from rehearsal_folder import TI2V, TI2V_SHAPES, TI2V_SMALL, make_5b
from speed_measure import GIB, seconds_of
from speed_model import lora_trainer, random_model, step, targets

from lapwan.wan.backbone import WanBackbone
from lapwan.wan.transformer.compile import compile_time
from lapwan.wan.transformer.forward import first_frame_times

RANK = 32
ALL = f"--set 'targets={{recipe=\"all\",rank={RANK}}}'"
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError)


def command_rows(small: bool) -> list[Row]:
    """What a user types, in order."""
    size, frames, video = ("64x96", 17, 9) if small else ("480x832", 121, 33)
    train = f"train-lora --model {TI2V} --cache cache {ALL} --steps {2 if small else 8}"
    make = f"generate --model {TI2V} --prompt 剪刀剪断组织 --size {size} --num-frames {video} --steps 4"
    return [
        Row("cache", f"cache --dataset clips/clips.jsonl --model {TI2V} --size {size} --num-frames {frames} -o cache",
            keeps=True),
        Row("lora", f"{train} -o run", keeps=True),
        Row("lora-24", f"{train} --memory 24 -o r"),
        Row("lora-nf4-12", f"{train} --memory 12 --dtype nf4 -o r"),
        Row("generate-t2v", f"{make} --lora run/lapwan.safetensors -o t2v.mp4"),
        Row("generate-i2v", f"{make} --image clips/first.png -o i2v.mp4"),
    ]


def run_commands(folder: Path, small: bool, left: Callable[[], float]) -> Iterator[str]:
    """A line of Markdown for each row; rows that the time does not allow are named."""
    yield "| row | exit | seconds | first step | a step | GPU GiB | what it said of memory |\n" + 7 * "|---" + "|"
    for row in command_rows(small):
        if left() < 60:
            yield f"| {row.name} | not started: no time left |  |  |  |  |  |"
            continue
        result = run_row(row, folder, "0")
        stderr = [text for _, text in result["stderr"]]
        said = next((text for text in reversed(stderr) if "memory: peak" in text), "")
        plans = [text.strip() for text in stderr if text.strip().startswith(("memory", "GiB", "cuda"))]
        yield (f"| `lapwan {row.command}` | {result['exit']} | {result['seconds']} | {result['first_step'] or ''} | "
               f"{result['step_seconds'] or ''} | {result['peaks']['gpu']} | {said or ' '.join(plans)} |")
        if result["exit"]:
            yield "\n".join(f"    {text}" for text in stderr[-12:])


def peft_step(
    model: WanBackbone, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], recompute: bool
) -> Callable[[], None]:
    """A step of diffusers + peft over the same weights."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(model.transformer.config)
    theirs.load_state_dict(model.transformer.state_dict(), assign=True)
    theirs.rope = copy.deepcopy(model.transformer.rope)
    theirs.requires_grad_(False)
    paths = list(targets(model, len(model.transformer.blocks), RANK))
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths))
    if recompute:
        theirs.enable_gradient_checkpointing()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].is_cuda)
    x, times, text = inputs
    target = torch.randn_like(x)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            out = theirs(x.bfloat16(), times, text, return_dict=False)[0]
        (out.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return one


def turns(works: dict[str, Callable[[], object]], rounds: int) -> Iterator[str]:
    """Each work in turn; medians, peaks, and how many times as long each takes as the first."""
    times: dict[str, list[float]] = {name: [] for name in works}
    peaks = dict.fromkeys(works, 0.0)
    for name, work in list(works.items()):
        compiled = compile_time()[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds_of(work)
            seconds_of(work)
        except torch.OutOfMemoryError as error:
            yield f"| {name} | out of memory: {str(error).splitlines()[0][:100]} | | | |"
            del works[name], times[name]
            continue
        peaks[name] = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        if (taken := compile_time()[0] - compiled) > 0.1:
            yield f"| {name} | compiled in {taken:.0f} s | | | |"
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    first = statistics.median(next(iter(times.values())))
    for name, own in times.items():
        median = statistics.median(own)
        yield (f"| {name} | {median:.3f} [{min(own):.3f}, {max(own):.3f}] | {len(own)} | {peaks[name]:.1f} | "
               f"{median / first:.2f} |")


def steps(device: torch.device, small: bool, recompute: bool) -> Iterator[str]:
    """Training steps with a clean first frame, with or without recomputation of whole blocks."""
    size, rounds = ("5b_small", 2) if small else ("5b_480", 5)
    model = random_model(device, TI2V_SMALL if small else TI2V_SHAPES)
    config, count = model.transformer.config, len(model.transformer.blocks)
    trainer, _ = lora_trainer(model, size, count, RANK, first_frame=1.0)
    batch = trainer.data.load_batch([0])
    x, text = batch.latents_BCTHW, torch.zeros(1, 512, config.text_dim, device=device, dtype=torch.bfloat16)
    text[0, :len(batch.text[0])] = batch.text[0]
    clean = torch.ones(1, dtype=torch.bool, device=device)
    times = first_frame_times(torch.tensor([700.0], device=device), clean, x.shape[2:], config.patch_size).per_token()
    plain = random_model(device, TI2V_SMALL if small else TI2V_SHAPES)
    what = "small" if small else "480x832, 121 frames, batch 1"
    yield f"| step, {what} | seconds | n | peak GiB | times as long |\n" + 5 * "|---" + "|"

    def ours(kind: str, compiled: bool) -> Callable[[], None]:
        def one() -> None:
            model.checkpoint(kind)
            model.compile(compiled and not small)
            step(trainer)
        return one

    kind, what = ("block", "blocks recomputed") if recompute else ("off", "nothing recomputed")
    works = {f"lapwan, compiled, {what}": ours(kind, True),
             f"diffusers + peft, {what}": peft_step(plain, (x, times, text), recompute),
             f"lapwan, not compiled, {what}": ours(kind, False)}
    yield from turns(works, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500, help="no row is started when fewer than 60 are left")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", default="make,commands,steps")
    options = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"

    def left() -> float:
        return options.seconds - (time.monotonic() - began)

    def say(line: str) -> None:
        print(line, flush=True)
        with options.output.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    options.output.parent.mkdir(parents=True, exist_ok=True)
    say(f"TI2V-5B on {name}, torch {torch.__version__}, {time.strftime('%F %T')}\n")
    parts = options.parts.split(",")
    if "make" in parts and not (options.work / TI2V).exists():
        for part in make_5b(options.work, str(device), options.small):
            print(f"{time.monotonic() - began:6.1f} s  {part}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    def measure_steps(recompute: bool) -> None:
        try:
            for line in steps(device, options.small, recompute):
                say(line)
        except FAULTS as error:  # other rows come after
            say(f"steps failed: {type(error).__name__}: {str(error)[:400]}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say("")

    if "steps" in parts:
        measure_steps(recompute=True)
    if "commands" in parts:
        for line in run_commands(options.work, options.small, left):
            say(line)
        say("")
    if "steps" in parts:
        if left() > 60:
            measure_steps(recompute=False)
        else:
            say("steps without recomputation: no time left")
    say(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
