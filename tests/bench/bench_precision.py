"""Both training stages on quantised bases of the trained embedded model: losses beside bf16's, errors by block.

    python tests/bench/bench_precision.py --out precision.md                     # a CPU core: about ten minutes
    python tests/bench/bench_precision.py --steps 12 --clips 12 --dtypes bf16,nf4

The same clips, noise and sigmas in every run, so that a difference in loss is the base's rounding alone. Compared are
the loss in training (means over the first and last third of the steps) and on held-out clips at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from lapwan.commands.table import COMMANDS
from lapwan.models.base import Base
from lapwan.models.spec import read_spec
from lapwan.names import NoiseExpert, Precision
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.model import tiny_folder
from lapwan.wan.backbone import load_transformer
from lapwan.wan.quantise.load import Recipe

SMALL = {"targets.last_blocks": "4", "targets.ffn_last_blocks": "4", "validation.clips": "4", "validation.sigmas": "2"}


def call(name: str, **changes: object) -> None:
    row = next(row for row in COMMANDS if row.name == name)
    options = {key.replace("__", "."): str(value) for key, value in changes.items()}
    row.run(load(row.settings_model(), options=options, environment={}), RunOptions(overwrite=True))


def make_cache(work: Path, clips: int) -> Path:
    if not (work / "cache").is_dir():
        write_dataset(work / "clips", clips, 5, (64, 64), 9, test_share=0.25)
        call("label", clips=work / "clips" / "clips.jsonl", output=work / "labels.jsonl")
        call("cache", dataset=work / "labels.jsonl", model="tiny", output=work / "cache", num_frames=9, size="64x64")
    return work / "cache"


def curve(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(command: str, dtype: str, work: Path, cache: Path, steps: int, lr: float) -> list[dict[str, float]]:
    run = work / f"{command}-{dtype}"
    if not (run / "metrics.jsonl").is_file():
        options = {"data__cache": cache, "output": run, "model": "tiny", "steps": steps, "dtype": dtype, "seed": 1,
                   "optimizer__lr": lr, "batch_size": 2, "validation__every": 2 * steps, "save_every": 2 * steps,
                   "trained_blocks": "auto"}
        call(command, **options, **{key.replace(".", "__"): value for key, value in SMALL.items()})
    return curve(run)


@torch.no_grad()
def block_errors(precision: Precision, noise_expert: NoiseExpert) -> list[float]:
    """Relative error of what each block adds, given the plain model's inputs."""
    spec = read_spec(tiny_folder("t2v"))
    plain = load_transformer(spec, noise_expert)
    made = Base(spec).load(noise_expert, recipe=Recipe(precision)).transformer
    seen: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []
    for block in plain.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append((given, out)))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, *spec.latent_shape(17, 96, 96), generator=generator)
    text = torch.randn(1, 512, spec.text_dim, generator=generator) * 0.3
    plain(hidden_states=x, timestep=torch.tensor([800.0]), encoder_hidden_states=text)
    return [float((block(*given) - out).norm() / (out - given[0]).norm())
            for block, (given, out) in zip(made.blocks, seen, strict=True)]


def report(work: Path, cache: Path, dtypes: list[str], steps: int, lr: float) -> str:
    lines = [f"Loss over {2 * steps} steps of both noise experts, trained embedded model, torch {torch.__version__}",
             "", "| stage | base | first third | last third | against bf16 | held-out after | against bf16 |",
             "|---|---|---|---|---|---|---|"]
    for command in ("train-lora", "train-moe"):
        reference: tuple[float, float] | None = None
        for dtype in dtypes:
            rows = train(command, dtype, work, cache, steps, lr)
            third = max(1, len(rows) // 3)
            early, late = (sum(row["loss/diffusion"] for row in part) / len(part)
                           for part in (rows[:third], rows[-third:]))
            held = rows[-1]["validation/mean"]
            reference = reference or (late, held)
            change = [f"{100 * (now / then - 1):+.2f} %" for now, then in zip((late, held), reference, strict=True)]
            lines.append(f"| {command} | {dtype} | {early:.4f} | {late:.4f} | {change[0]} | {held:.4f} | {change[1]} |")
    lines += ["", "Relative error of what each block adds (inputs of the plain model), by block:", ""]
    for precision in Precision:
        for noise_expert in NoiseExpert:
            errors = " ".join(f"{error:.4f}" for error in block_errors(precision, noise_expert))
            lines.append(f"- {precision.value}, {noise_expert.value} noise: {errors}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each noise expert")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtypes", default="bf16,fp8,int8,nf4", help="the first is what the others are held against")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lapwan-bench-precision")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    cache = make_cache(given.work, given.clips)
    text = report(given.work, cache, given.dtypes.split(","), given.steps, given.lr)
    if given.out:
        given.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
