"""The comparable rows of bench_speed.py through diffusers and peft, and ours beside them in the same process.

    python tests/bench/bench_peers.py --rows forward_256,lora8_256 --minutes 9 --out peers.json
    python tests/bench/bench_peers.py --tiny                       # the same code on a CPU

The same random weights, inputs, LoRA targets and ranks, loss and optimizer; ours runs before and after theirs, so that
a drift of the machine shows. diffusers runs as its own documentation says: bf16, SDPA, `compile_repeated_blocks` where
compiled; its training step as peft's users write it, with fused AdamW and clipped gradients. Rows that --out has whole
are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from bench_speed import FAULTS
from speed_measure import Results, forward_flops, measure, step_flops
from speed_model import (
    A14B,
    LATENTS,
    SMALL,
    inputs,
    lora_trainer,
    random_model,
    spoken,
    step,
    targets,
)

from lapwan.wan.backbone import WanBackbone


def _tokens(size: str) -> int:
    t, h, w = LATENTS[size]
    return t * (h // 2) * (w // 2)


def _theirs(model: WanBackbone, size: str) -> Callable[[], torch.Tensor]:
    x, t, text = inputs(model, size)
    x = x.bfloat16()

    def run() -> torch.Tensor:
        given = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}
        out: torch.Tensor = model.transformer(**given, return_dict=False)[0]
        return out
    return run


def forward(results: Results, model: WanBackbone, size: str, tiny: bool, seconds: float) -> None:
    """A forward without gradients: ours, theirs eager, theirs compiled, ours again."""
    title, size = size, "small" if tiny else size
    flops = forward_flops(model.transformer, _tokens(size))
    model.compile(not tiny)
    ours = partial(torch.no_grad()(model.velocity), *spoken(model, size))
    run = torch.no_grad()(_theirs(model, size))
    results.add(measure(f"forward_{title}_ours_first", ours, flops, seconds))
    results.add(measure(f"forward_{title}_diffusers", run, flops, seconds))
    if not tiny:
        model.transformer.compile_repeated_blocks(fullgraph=True)
        results.add(measure(f"forward_{title}_diffusers_compiled", run, flops, seconds))
        for block in model.transformer.blocks:
            block._compiled_call_impl = None
    results.add(measure(f"forward_{title}_ours_again", ours, flops, seconds))


def _peft_step(model: WanBackbone, size: str, last: int, rank: int = 16) -> Callable[[], None]:
    from peft import LoraConfig

    model.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets(model, last, rank))))
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].is_cuda)
    run, x = _theirs(model, size), inputs(model, size)[0]
    target = torch.randn_like(x)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            out = run()
        (out.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return one


def lora_step(
    results: Results, model: WanBackbone, name: str, size: str, last: int, kind: str, tiny: bool,
    seconds: float,
) -> None:
    """A LoRA step on the last blocks: ours, theirs, ours again."""
    size = "small" if tiny else size
    flops = step_flops(model.transformer, _tokens(size), last)
    model.compile(not tiny)

    def ours(when: str) -> None:
        model.checkpoint(kind)
        trainer, adapted = lora_trainer(model, size, last)
        results.add(measure(f"{name}_ours_{when}", lambda: step(trainer), flops, seconds, note=kind))
        adapted.off()

    ours("first")
    try:
        if kind == "block":
            model.transformer.enable_gradient_checkpointing()
        results.add(measure(f"{name}_diffusers_peft", _peft_step(model, size, last), flops, seconds, note=kind))
    finally:  # a step that the card does not hold must not change the rows after it
        model.transformer.disable_gradient_checkpointing()
        model.transformer.unload_lora()
        model.transformer.requires_grad_(False)
    ours("again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="forward_256,lora8_256,lora40_256,forward_480,lora40_480")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, seconds = Results(args.out), 0.3 if args.tiny else args.seconds
    model = random_model(device, SMALL if args.tiny else A14B)
    count, started = len(model.transformer.blocks), time.monotonic()
    last = 2 if args.tiny else 8
    rows: dict[str, Callable[[], None]] = {
        "forward_256": lambda: forward(results, model, "256", args.tiny, seconds),
        "lora8_256": lambda: lora_step(results, model, "lora8_256", "256", last, "off", args.tiny, seconds),
        "lora40_256": lambda: lora_step(results, model, "lora40_256", "256", count, "off", args.tiny, seconds),
        "forward_480": lambda: forward(results, model, "480", args.tiny, seconds),
        "lora40_480": lambda: lora_step(results, model, "lora40_480", "480", count, "block", args.tiny, seconds),
    }
    for name in args.rows.split(","):
        if f"{name}_ours_again" in results.rows:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print(f"{name}: no time left")
            continue
        try:
            rows[name]()
        except FAULTS as error:
            print(f"{name} FAILED: {type(error).__name__}: {str(error)[:600]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
