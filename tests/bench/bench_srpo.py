"""Preference alignment at the full size: LoRA on the low-noise expert, 512x512, within 80 GB.

    python tests/bench/bench_srpo.py [--cap 80] [--out srpo.json] [--cases 1x4,4x1] [--offload] [--tiny]

Both noise experts have A14B's shapes and random weights made on the device, the VAE and the reward (ViT-H-14, as HPS
v2.1 is) their full size; the run is the command's: rollouts of 25 steps, three optimizer steps, checkpoint. A case is
batch x accumulate. Reported: seconds a step and what a rollout and a gradient take, the peak, and what the plan said.
Cases that --out has are not run again. `--tiny` is the same on small shapes, for a CPU. Random weights say nothing of
quality.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from speed_model import A14B, SMALL, random_model, shape_folder

from lapwan import rng
from lapwan.memory.srpo import plan_srpo
from lapwan.models.base import Base
from lapwan.models.fingerprints import text_encoder_fingerprint
from lapwan.models.spec import read_spec
from lapwan.names import NoiseExpert
from lapwan.rewards.clip import ClipReward
from lapwan.rewards.open_clip import VIT_H_14, Architecture, Tower
from lapwan.settings.srpo import SrpoSettings
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS
from lapwan.train.objective import make_draws
from lapwan.train.recipe import run_training
from lapwan.train.srpo import recipe
from lapwan.train.srpo.data import _ENCODER, _hash, read_data
from lapwan.train.srpo.plan import trained_noise_experts

GIB = 2**30
PROMPTS = [f"a photograph of instrument number {i} on a table" for i in range(24)]
SMALL_CLIP = Architecture(Tower(64, 2, 2), Tower(64, 2, 2), embed=32, patch=14, image=224)


class RandomBase(Base):
    """Noise experts whose weights are drawn where they are wanted; the folder holds their shapes only."""

    def load(self, noise_expert: NoiseExpert, dtype: torch.dtype = torch.bfloat16, device: Any = "cpu", *_: Any) -> Any:
        config = json.loads((self.spec.component(noise_expert) / "config.json").read_text(encoding="utf-8"))
        made_on = "cuda" if torch.cuda.is_available() else "cpu"  # also what will wait in host memory
        made = random_model(torch.device(made_on), {k: config[k] for k in A14B})
        made.transformer.to(device)
        return made


class RandomReward(ClipReward):
    """A full-size tower for pictures; texts are numbers keyed by their letters, since no tokenizer travels."""

    def text(self, captions: Sequence[str]) -> Tensor:
        size = self._model.config.projection_dim
        rows = [F.normalize(torch.randn(size, generator=rng.generator("text", one)), dim=-1) for one in captions]
        return torch.stack(rows).to(self._model.device)


def make_folder(folder: Path, config: dict[str, Any]) -> None:
    """Shapes alone for the transformers; with A14B's, a VAE of its size."""
    from diffusers import AutoencoderKLWan

    shape_folder(folder, config)
    if config is A14B:
        shutil.rmtree(folder / "vae")
        torch.manual_seed(0)
        AutoencoderKLWan().save_pretrained(folder / "vae")


def write_features(path: Path, base: Base, width: int) -> None:
    """Text features at random, under the names the run looks for: no text encoder is loaded."""
    prompts = [*PROMPTS, "", SrpoSettings.model_fields["prompts"].annotation.model_fields["negative"].default]
    tensors = {_hash(p): torch.randn(40, width, generator=rng.generator("features", p)).bfloat16() for p in prompts}
    save_file(tensors, path, metadata={_ENCODER: text_encoder_fingerprint(base.spec)})


@dataclass
class Case:
    """Prompts at a time, batches a step."""

    batch: int
    accumulate: int
    memory: str = "auto"


def settings_of(work: Path, case: Case, tiny: bool, device: str) -> SrpoSettings:
    return SrpoSettings.model_validate({
        "model": str(work / "model"), "output": work / f"run_{case.batch}x{case.accumulate}_{case.memory}",
        "prompts": {"file": work / "prompts.txt", "features": work / "features.safetensors"},
        "rewards": [{"type": "hps", "path": "HPS_v2.1_compressed.pt", "dtype": "bf16"}],
        "size": (32, 32) if tiny else (512, 512), "steps": 3, "batch_size": case.batch, "accumulate": case.accumulate,
        "rollout": {"steps": 3 if tiny else 25}, "held_out": {"count": 0}, "save_every": 100, "device": device,
        "memory": case.memory, "dtype": "bf16",
    })


def seconds_of(function: Any, device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.monotonic()
    value = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started, value


def parts_of_a_step(trainer: Any, case: Case, device: torch.device) -> dict[str, float]:
    """Seconds of one batch's rollout, and of its loss with backward."""
    noise_expert = trainer.schedule[0]
    trainer.callbacks["onload"].before_turn(noise_expert)
    batch = trainer.data.load_batch(list(range(case.batch)))
    keys = [(7, noise_expert.value, i, own) for i, own in enumerate(batch.ids)]
    draws = make_draws(batch, keys, trainer.data.streams[noise_expert].sigma_rule)
    rollout, [batch] = seconds_of(lambda: trainer.objective.prepare(noise_expert, [batch], draws=[draws]), device)

    def gradient() -> None:
        with trainer.objective.loss(noise_expert, batch, draws) as loss:
            loss.total_B.sum().backward()

    return {"rollout_seconds": rollout, "gradient_seconds": seconds_of(gradient, device)[0]}


def run(work: Path, case: Case, cap: int, tiny: bool, device: torch.device) -> dict[str, Any]:
    settings = settings_of(work, case, tiny, str(device))
    base = RandomBase(read_spec(work / "model"))
    data = read_data(settings, base.spec)
    noise_experts = trained_noise_experts(settings, base.spec)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    planned = plan_srpo(settings, base, noise_experts, base.spec.noise_experts, data.bucket, EMBEDDED_REWARD_KINDS,
                        device, free=cap)
    shape = SMALL_CLIP if tiny else VIT_H_14
    with torch.device(device):
        from transformers import CLIPModel

        model = CLIPModel(shape.config()).bfloat16().requires_grad_(False).eval()
    rewards = {"hps": RandomReward("hps", model, None, "pad", 1.0)}
    settings.output.mkdir()
    loaded, trainer = seconds_of(
        lambda: recipe.prepare(settings, base, data, rewards, planned, device), device)
    run_training(trainer, settings)
    rows = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "case": f"{case.batch}x{case.accumulate}", "asked": case.memory, "memory": planned.line,
        "table": list(planned.table),
        "load_seconds": loaded, "step_seconds": [row["seconds"] for row in rows], "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows], "planned_gib": planned.peak / GIB,
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["plan_over_peak"] = found["planned_gib"] / found["peak_gib"]
    return found | parts_of_a_step(trainer, case, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cap", type=float, default=80.0, help="GB that this process may take")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--cases", default="1x4,4x1")
    parser.add_argument("--offload", action="store_true", help="one noise expert at a time, in a case of its own")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cpu" if asked.tiny else "cuda")
    cap = int(asked.cap * 1e9)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.get_device_properties(0).total_memory))
    cases = [Case(*map(int, text.split("x"))) for text in asked.cases.split(",")]
    if asked.offload:
        cases.append(Case(cases[0].batch, cases[0].accumulate, "one"))
    results = []
    if asked.out is not None and asked.out.is_file():
        results = json.loads(asked.out.read_text(encoding="utf-8"))
    known = {(row["case"], row.get("asked", "auto")) for row in results}
    cases = [case for case in cases if (f"{case.batch}x{case.accumulate}", case.memory) not in known]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
        config = SMALL if asked.tiny else A14B
        make_folder(work / "model", config)
        write_features(work / "features.safetensors", Base(read_spec(work / "model")), config["text_dim"])
        for case in cases:
            results.append(run(work, case, cap, asked.tiny, device))
            gc.collect()  # trainer and rollout know each other: the last case's models go only now
            print(json.dumps(results[-1]), flush=True)
            if asked.out is not None:
                asked.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
