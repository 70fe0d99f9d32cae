"""Why the text router reads captions without keywords worse than a linear probe of the same features.

    PYTHONPATH=. python tests/bench/bench_router.py --work DIR --out router.md   # one CPU core: a quarter of an hour

The router alone, without any video: the training captions of examples/comparison/comparison.toml, the router's own
losses, lr and batch size, one thing changed in each row. A stage-2 run of 48 steps steps the router 96 times, once for
each noise expert. Rows are chosen by the validation columns: captions of the comparison's validation scenes, and
captions without keywords that are not among its test captions (accuracy of each family, averaged). The last column is
the comparison's own test set, for a look.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.comparison.captions import paraphrases
from lapwan.data.labels import CaptionLabeller, resolve_hint
from lapwan.data.taxonomy import load_taxonomy
from lapwan.evaluation.router_accuracy import fit_probe
from lapwan.losses import routing
from lapwan.models.spec import read_spec
from lapwan.moe.router import TextRouter, masked_mean
from lapwan.tiny.captions import caption_for
from lapwan.tiny.dataset import plan_dataset
from lapwan.tiny.model import tiny_folder
from lapwan.tiny.scenes import render
from lapwan.wan.text import encode_text, load_text_encoder

SEED, LR, BATCH, WARMUP, EXPERTS = 11, 1.5e-3, 8, 5, 4  # as in comparison.toml
TAXONOMY = load_taxonomy("surgical4")


@dataclass(frozen=True)
class Captions:
    """`text_ND` mean features, `label_NE` label weights, `family_N`, whether `english_N`."""

    text_ND: Tensor
    label_NE: Tensor
    family_N: Tensor
    english_N: Tensor


@dataclass(frozen=True)
class Row:
    """What differs from the comparison's router."""

    name: str
    steps: int = 96
    shape: str = "LayerNorm, 512, 64, E"
    lr: float = LR
    weight_decay: float = 0.01
    teacher: float = 0.35
    loss: str = "KL(student, teacher)"
    train: str = "train"


ONE_LAYER = "LayerNorm, E"
ROWS = (
    Row("the comparison's router"),
    Row("4 times the steps", 384),
    Row("16 times the steps", 1536),
    Row("weight decay 1", weight_decay=1.0),
    Row("lr 5e-3", lr=5e-3),
    Row("teacher temperature 0.1", teacher=0.1),
    Row("KL(teacher, student)", loss="KL(teacher, student)"),
    Row("cross entropy", loss="cross entropy"),
    Row("64 hidden, 4 times the steps", 384, shape="LayerNorm, 64, E"),
    Row("standardised, no LayerNorm, 4 times the steps", 384, shape="standardised, 512, 64, E"),
    Row("dropout 0.5, 4 times the steps", 384, shape="dropout"),
    Row("640 captions, 4 times the steps", 384, train="640 captions"),
    Row("half the captions English, 4 times the steps", 384, train="half English"),
    Row("no GELU", shape="no GELU"),
    Row("no GELU, 4 times the steps", 384, shape="no GELU"),
    Row("no GELU, 16 times the steps", 1536, shape="no GELU"),
    Row("one layer, lr 1e-2", shape=ONE_LAYER, lr=1e-2),
    Row("one layer, lr 1e-2, 4 times the steps", 384, shape=ONE_LAYER, lr=1e-2),
    Row("one layer, lr 1e-2, 16 times the steps", 1536, shape=ONE_LAYER, lr=1e-2),
)
Reader = Callable[[Tensor], Tensor]  # features [N, D] -> the family of each [N]


def scene_captions(count: int, seed: int, english: float | None = None) -> list[tuple[str, str]]:
    """(caption, instrument) of a part's scenes; what is drawn does not matter."""
    specs = [spec for spec, _ in plan_dataset(count, seed, (96, 96), 17, 16.0, test_share=0.0)]
    if english is None:
        return [(render(replace(spec, frames=1, size=(16, 16))).caption, spec.instrument) for spec in specs]
    return [(caption_for(spec, np.random.default_rng([spec.seed, 99]), english), spec.instrument) for spec in specs]


def read_captions(work: Path) -> dict[str, Captions]:
    test = paraphrases(120, SEED)
    known = {text for text, _ in test}
    other = {text: instrument for text, instrument in paraphrases(1200, SEED + 1) if text not in known}
    pairs = {
        "train": scene_captions(160, 10 * SEED), "640 captions": scene_captions(640, 10 * SEED),
        "half English": scene_captions(160, 10 * SEED, 0.5), "validation": scene_captions(96, 10 * SEED + 1),
        "no keyword": list(other.items()), "no keyword, test": test,
    }
    if not (work / "captions.pt").is_file():
        encoder = load_text_encoder(read_spec(tiny_folder("t2v")))
        with torch.no_grad():
            found = {name: masked_mean([encode_text(encoder, [text])[0] for text, _ in own])
                     for name, own in pairs.items()}
        torch.save(found, work / "captions.pt")
    features, resolver = torch.load(work / "captions.pt"), CaptionLabeller(TAXONOMY)
    made = {}
    for name, own in pairs.items():
        families = torch.tensor([resolve_hint(instrument, TAXONOMY) for _, instrument in own]).argmax(dim=1)
        weights = torch.tensor([list(resolver.label(text).weights) for text, _ in own])
        made[name] = Captions(features[name], weights, families, torch.tensor([text.isascii() for text, _ in own]))
    return made


def shaped(shape: str, dim: int) -> TextRouter:
    router = TextRouter(dim, EXPERTS)
    first = router.mlp[0]
    match shape:
        case "no GELU":
            router.mlp[2], router.mlp[4] = nn.Identity(), nn.Identity()
        case "LayerNorm, E":
            router.mlp = nn.Sequential(first, nn.Identity(), nn.Linear(dim, EXPERTS))
        case "LayerNorm, 64, E":
            router.mlp = nn.Sequential(first, nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, EXPERTS))
        case "standardised, 512, 64, E":
            router.mlp[0] = nn.Identity()
        case "dropout":
            router.mlp = nn.Sequential(first, nn.Dropout(0.5), *router.mlp[1:3], nn.Dropout(0.5), *router.mlp[3:])
    return router


def loss_of(row: Row, student_BE: Tensor, label_BE: Tensor, family_B: Tensor) -> Tensor:
    teacher_BE = routing.teacher(label_BE, row.teacher)
    match row.loss:
        case "KL(teacher, student)":
            return routing.teacher_kl(teacher_BE, student_BE)
        case "cross entropy":
            return -student_BE.log().gather(1, family_B[:, None])[:, 0]
    return routing.teacher_kl(student_BE, teacher_BE)


def trained(row: Row, data: Captions, seed: int) -> Reader:
    """The router alone, by its own losses, as the trainer steps it (AdamW, warmup, gradient clipped at 1)."""
    torch.manual_seed(seed)
    router = shaped(row.shape, data.text_ND.shape[1])
    mean_D, deviation_D = data.text_ND.mean(dim=0), data.text_ND.std(dim=0)

    def route(text_BD: Tensor) -> Tensor:
        given_BD = (text_BD - mean_D) / deviation_D if row.shape.startswith("standardised") else text_BD
        answers: Tensor = router(list(given_BD[:, None]), None)
        return answers

    optimizer = torch.optim.AdamW(router.parameters(), lr=row.lr, weight_decay=row.weight_decay)
    usage_E, left = torch.full((EXPERTS,), 1 / EXPERTS), []
    for step in range(row.steps):
        optimizer.param_groups[0]["lr"] = row.lr * min(1.0, (step + 1) / WARMUP)
        left = left if len(left) >= BATCH else torch.randperm(len(data.text_ND)).tolist()
        batch, left = left[:BATCH], left[BATCH:]
        student_BE = route(data.text_ND[batch])
        usage_E = routing.update_usage(usage_E, student_BE.mean(dim=0))
        hinge_B = routing.entropy_hinge(student_BE, float(routing.entropy(student_BE.detach()).mean()))
        loss = loss_of(row, student_BE, data.label_NE[batch], data.family_N[batch])
        loss = loss + 0.1 * routing.balance(usage_E, student_BE) + 0.02 * hinge_B
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
    router.eval()
    return lambda text_ND: route(text_ND).argmax(dim=1)


def probe(data: Captions) -> Reader:
    found = fit_probe(list(data.text_ND[:, None]), data.family_N, EXPERTS)
    return lambda text_ND: torch.from_numpy(found.predict(list(text_ND[:, None])))


def by_family(right_N: Tensor, family_N: Tensor) -> float:
    """Accuracy of each family, averaged over the families that occur, in %."""
    return 100 * statistics.mean(float(right_N[family_N == f].float().mean()) for f in family_N.unique().tolist())


@torch.no_grad()
def scores(reader: Reader, captions: dict[str, Captions]) -> list[float]:
    """Validation captions; without keywords: all, English, Chinese; the comparison's test captions without keywords."""
    found = []
    for name in ("validation", "no keyword", "no keyword, test"):
        own = captions[name]
        right_N = reader(own.text_ND) == own.family_N
        found.append(by_family(right_N, own.family_N))
        if name == "no keyword":
            found += [by_family(right_N[kept], own.family_N[kept]) for kept in (own.english_N, ~own.english_N)]
    return found


def line(name: str, runs: list[list[float]]) -> str:
    cells = [f"{statistics.mean(values):.1f}" for values in zip(*runs, strict=True)]
    if len(runs) > 1:
        cells[1] += f" ± {statistics.stdev(run[1] for run in runs):.1f}"
    return f"| {name} | " + " | ".join(cells) + " |"


def report(captions: dict[str, Captions], seeds: int) -> str:
    lines = [f"% right, means over {seeds} seeds (± their deviation), torch {torch.__version__}; "
             + ", ".join(f"{name}: {len(own.family_N)} captions, {int(own.english_N.sum())} English"
                         for name, own in captions.items()), "",
             "| router | validation captions | no keyword | English | Chinese | no keyword, test |",
             "|---|---|---|---|---|---|"]
    for name in ("train", "640 captions", "half English"):
        lines.append(line(f"linear probe, {name}", [scores(probe(captions[name]), captions)]))
    for row in ROWS:
        lines.append(line(row.name, [scores(trained(row, captions[row.train], seed), captions)
                                     for seed in range(seeds)]))
        sys.stderr.write(lines[-1] + "\n")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the captions' features")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    text = report(read_captions(given.work), given.seeds)
    if given.out:
        given.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
