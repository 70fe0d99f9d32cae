"""The memory plan against the allocator: predicted and measured peaks of training and generation, one row each.

    python tests/bench/bench_plan.py --out plan.json                  # a GPU; 2-3 minutes
    python tests/bench/bench_plan.py --rows lora_bf16,nf4_all --out plan.json
    python tests/bench/bench_plan.py --markdown plan.json
    python tests/bench/bench_plan.py --tiny                         # the same code on a CPU; nothing is measured there

A model of A14B's width with few blocks (random weights, both noise experts from one file) and a cache of random clips
are written to --work once; every row then goes the commands' own way: settings, plan, load, trainer or generator.
Rows are added to --out one by one, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lapwan.api import VideoGenerator
from lapwan.caching.index import CachedItem, CacheIndex, write_index
from lapwan.caching.layout import recipe_fingerprint, write_latents, write_prompts, write_text_features
from lapwan.data.taxonomy import load_taxonomy
from lapwan.memory.training import plan_training
from lapwan.models.base import Base
from lapwan.models.spec import read_spec
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.model import tiny_folder
from lapwan.train import recipe
from lapwan.train.lora import recipe as lora_recipe
from lapwan.train.moe import recipe as moe_recipe
from lapwan.train.moe.recipe import base_loras, plan_mixture
from lapwan.train.run_folder import start_folder

GIB = 1 << 30
A14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "freq_dim": 256}
SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "freq_dim": 64}
BLOCKS = 5
SIZES = {"256": (81, 256, 256), "480": (81, 480, 832), "small": (17, 64, 64)}


def write_model(folder: Path, tiny: bool) -> None:
    """The embedded model's folder with other transformers in it."""
    from diffusers import WanTransformer3DModel

    shutil.copytree(tiny_folder("t2v"), folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {**(SMALL if tiny else A14B), "num_layers": BLOCKS, "rope_max_seq_len": 1024}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    torch.manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        scale = 0.02 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        tensors[name] = (torch.randn(parameter.shape, device=device) * scale).to(torch.bfloat16).cpu()
    for part in ("transformer", "transformer_2"):
        for file in (folder / part).iterdir():
            file.unlink()
        (folder / part / "config.json").write_text(json.dumps(config))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(tensors, weights)
    os.link(weights, folder / "transformer_2" / weights.name)


def write_cache(folder: Path, model: Path, size: str) -> None:
    spec = read_spec(model)
    folder.mkdir()
    frames, height, width = SIZES[size]
    items = []
    for index in range(4):
        stem = f"clip{index}"
        write_latents(folder / f"{stem}_wan.safetensors", torch.randn(spec.latent_shape(frames, height, width)), None,
                      (width, height), frames, {})
        write_text_features(folder / f"{stem}_te.safetensors", torch.randn(60, spec.text_dim), stem, {})
        weights = tuple(float(e == index) for e in range(4))
        items.append(CachedItem(
            id=stem, latents=f"{stem}_wan.safetensors", text=f"{stem}_te.safetensors", caption=stem, frames=frames,
            height=height, width=width, label=index, label_weights=weights,
            fingerprints={kind: recipe_fingerprint({}) for kind in ("latents", "text")}))
    empty = torch.randn(1, spec.text_dim)
    write_prompts(folder / "lapwan_prompts.safetensors", empty, empty.clone(), {})
    write_index(CacheIndex(folder, tuple(items), task="t2v", fps=16.0, text_dim=spec.text_dim, taxonomy="surgical4"))


class Bench:
    def __init__(self, work: Path, tiny: bool) -> None:
        self.work, self.tiny = work, tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
        self.before = 0  # bytes that somebody else in this process holds
        self.model = work / "model"
        if not self.model.exists():
            work.mkdir(parents=True, exist_ok=True)
            write_model(self.model, tiny)
        os.environ["LAPWAN_CACHE_DIR"] = str(work / "cache")

    def cache(self, size: str) -> Path:
        folder = self.work / f"clips-{size}"
        if not folder.exists():
            write_cache(folder, self.model, size)
        return folder

    def train(self, size: str, moe: bool = False, **settings: Any) -> dict[str, Any]:
        size = "small" if self.tiny else size
        self._look()
        run = Path(tempfile.mkdtemp(dir=self.work))
        given = {"model": str(self.model), "output": run / "run", "data": {"cache": self.cache(size)}, "steps": 3,
                 "compile": "off", "noise_experts": ["high"], "save_every": 1000, "device": str(self.device),
                 **settings}
        try:
            return self._trained(given, moe)
        finally:
            shutil.rmtree(run)

    def _trained(self, given: dict[str, Any], moe: bool) -> dict[str, Any]:
        settings = (TrainMoeSettings if moe else TrainLoraSettings).model_validate(given)
        start_folder(settings, False)
        base = Base(read_spec(self.model))
        data = recipe.read_data(settings, base)
        started = time.perf_counter()
        if moe:
            taxonomy = load_taxonomy("surgical4")
            frozen = base_loras(settings, base)
            memory = plan_mixture(settings, base, data, taxonomy, frozen, self.device, dry_run=True)
            planned = time.perf_counter() - started
            trainer = moe_recipe.prepare(settings, base, data, taxonomy, self.device, memory=memory)
        else:
            memory = plan_training(settings, base, recipe.workload(data, base), self.device, predict=True)
            planned = time.perf_counter() - started
            trainer = lora_recipe.prepare(settings, base, data, self.device, memory=memory)
        loaded = time.perf_counter() - started - planned
        seconds: list[float] = []
        original = trainer._train_step

        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            found = original(*arguments)
            seconds.append(time.perf_counter() - begun)
            return found

        trainer._train_step = timed
        trainer.fit()
        return self._row(memory.plan, memory.line, planned, loaded, min(seconds))

    def generate(self, size: str, **options: Any) -> dict[str, Any]:
        frames, height, width = SIZES["small" if self.tiny else size]
        self._look()
        generator = VideoGenerator(str(self.model), device=str(self.device), compile="off", **options)
        request = {"num_frames": frames, "size": (height, width), "steps": 2, "guidance": 3.0, "negative_prompt": "x"}
        generator.generate("a", **request)  # loads
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        generator.generate("b", **request)
        [sampler] = generator._generators.values()
        plan = sampler.noise_experts._plan
        return self._row(plan, sampler.noise_experts._logged or "", 0.0, 0.0, (time.perf_counter() - started) / 2)

    def _look(self) -> None:
        gc.collect()
        self.before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _row(self, plan: Any, line: str, planned: float, loaded: float, seconds: float) -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() - self.before if self.device.type == "cuda" else 0
        return {"predicted_gib": plan.peak / GIB, "measured_gib": peak / GIB,
                "error_percent": 100 * (plan.peak - peak) / peak if peak else None, "plan_seconds": planned,
                "load_seconds": loaded, "predicted_step": plan.strategy.seconds, "measured_step": seconds,
                "parts_gib": {name: size / GIB for name, size in plan.parts.items()}, "line": line}


LAST = {"targets": {"last_blocks": 2, "ffn_last_blocks": 1}}
ALL = {"targets": {"last_blocks": "all", "ffn_last_blocks": "all"}}
ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "lora_bf16": lambda b: b.train("256", activation_checkpointing="off", **LAST),
    "lora_all_off": lambda b: b.train("256", activation_checkpointing="off", **ALL),
    "lora_all_block": lambda b: b.train("256", activation_checkpointing="block", **ALL),
    "nf4_all": lambda b: b.train("256", activation_checkpointing="block", dtype="nf4", **ALL),
    "fp8_last": lambda b: b.train("256", activation_checkpointing="off", dtype="fp8", **LAST),
    "stream": lambda b: b.train("256", activation_checkpointing="off", memory="stream", **LAST),
    "moe": lambda b: b.train("256", moe=True, activation_checkpointing="off", **LAST),
    "video_bf16": lambda b: b.generate("256", memory="both"),
    "both_experts": lambda b: b.train(
        "256", noise_experts=["high", "low"], activation_checkpointing="off", turn=1, **LAST),
    "video_fp8_stream": lambda b: b.generate("256", memory="stream", dtype="fp8"),
    "lora_compiled": lambda b: b.train("256", activation_checkpointing="off", compile="on", **ALL),
    "block_compiled": lambda b: b.train("256", activation_checkpointing="block", compile="on", **ALL),
    "int8_batch_2": lambda b: b.train("256", activation_checkpointing="off", dtype="int8", batch_size=2, **LAST),
    "moe_stream_fp8": lambda b: b.train("256", moe=True, noise_experts=["high", "low"], turn=1, dtype="fp8",
                                        memory="stream", activation_checkpointing="off", **LAST),
    "lora_all_op": lambda b: b.train("256", activation_checkpointing="op", **ALL),
    "one_expert": lambda b: b.train("256", noise_experts=["high", "low"], activation_checkpointing="off", turn=1,
                                    memory="one", **LAST),
    "video_one": lambda b: b.generate("256", memory="one"),
    "video_nf4": lambda b: b.generate("256", memory="both", dtype="nf4"),
    "fp8_all": lambda b: b.train("256", activation_checkpointing="block", dtype="fp8", **ALL),
    "lora_480_block": lambda b: b.train("480", activation_checkpointing="block", **LAST),
    "video_480": lambda b: b.generate("480", memory="one"),
}


def run(rows: list[str], out: Path, work: Path, tiny: bool, minutes: float) -> None:
    results = json.loads(out.read_text()) if out.is_file() else {}
    begun = time.monotonic()
    bench = Bench(work, tiny)
    for name in rows:
        if name in results and "error" not in results[name]:
            continue
        if time.monotonic() - begun > 60 * minutes:
            print("time is over; left:", ", ".join(n for n in rows if n not in results))
            break
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        try:
            results[name] = ROWS[name](bench)
        except Exception as error:  # noqa: BLE001 - one row's failure must not cost the others their device time
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["row_seconds"] = time.monotonic() - started
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in results[name].items()}, flush=True)
        out.write_text(json.dumps(results, indent=1))


def markdown(results: dict[str, Any]) -> str:
    lines = ["| row | predicted GiB | measured GiB | error | step predicted s | step measured s |",
             "|---|---|---|---|---|---|"]
    for name, row in results.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error'][:80]} | | | | |")
            continue
        error = "" if row["error_percent"] is None else f"{row['error_percent']:+.1f} %"
        lines.append(f"| {name} | {row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {error} | "
                     f"{row['predicted_step']:.3f} | {row['measured_step']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("plan.json"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lapwan-bench-plan")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    if given.markdown:
        print(markdown(json.loads(given.markdown.read_text())))
        return
    rows = [name for name in given.rows.split(",") if name]
    if unknown := [name for name in rows if name not in ROWS]:
        sys.exit(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    run(rows, given.out, given.work, given.tiny, given.minutes)
    print(markdown(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
