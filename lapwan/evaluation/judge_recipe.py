"""From a plan to a judge: read its clips, train, calibrate, measure on source videos that were not trained on."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from lapwan import console
from lapwan.console import count_text
from lapwan.errors import UserError
from lapwan.evaluation.judge_data import PARTS, JudgePlan, JudgeReader, JudgeSets
from lapwan.evaluation.judge_figures import answers, fit_temperatures, judge_figures
from lapwan.evaluation.judge_file import JudgeMetadata, TipKind, rounded
from lapwan.evaluation.judge_net import JudgeNet
from lapwan.evaluation.judge_training import JudgeClips, JudgeTraining, destroyed_clips, joined, train_judge_net


def make_judge(
    plan: JudgePlan, vae: Any, training: JudgeTraining, sources: bool, device: torch.device
) -> tuple[JudgeNet, JudgeMetadata]:
    """The judge of a plan, its weights rounded as its file stores them, with its figures.

    Args:
        plan: the clips.
        vae: the model's, on `device`.
        training: its numbers.
        sources: also learn from the source files that are there.
        device: that decodes and trains.

    Raises:
        UserError: a damaged cache, or no picture without an instrument.
    """
    reader, read = JudgeReader(plan, vae, sources, training.seed), {}
    with console.progress("clips", len(plan.items), "clip") as bar:
        for part in PARTS:
            read[part] = reader.read(part, bar.advance)
    for part, sets in read.items():
        if sets.of("none") is None:
            raise UserError(f"{plan.index.folder}: no picture without an instrument can be made of its {part} clips: "
                            "they have no boxes (or boxes that fill the picture); cache with roi, or add clips that "
                            "show none and pass --unlabelled none")
    clips = read["train"].of()
    assert clips is not None
    console.log(f"{count_text(len(clips), 'clip')} of {plan.frames} frames to train on, "
                f"{clips.frames_NTHWC.nbytes / 2**20:.0f} MiB")
    with console.progress("judge", training.steps, "step") as bar:
        net = rounded(train_judge_net(clips, training, device, lambda step, loss: bar.advance(
            1, **({} if math.isnan(loss) else {"loss": loss}))))
    temperatures = fit_temperatures(answers(net, _with_destroyed(read["calibrate"], training.seed + 1)))
    figures = _figures(net, read["test"], training.seed + 2, temperatures, plan.taxonomy.keys)
    return net, JudgeMetadata(
        families=list(plan.taxonomy.keys), names=[family.name for family in plan.taxonomy.families],
        taxonomy=plan.taxonomy.name, taxonomy_fingerprint=plan.taxonomy.fingerprint,
        canvas=(plan.canvas.height, plan.canvas.width), tip=_tip_kind(read["train"]),
        temperatures=(temperatures.state, temperatures.families), figures=figures,
        recipe={**asdict(training), "frames": plan.frames, "clips": {part: plan.count(part) for part in PARTS},
                "clips_by_family": plan.by_family(), "source_videos": len({item.group for item in plan.items}),
                "with_sources": read["train"].sources, "left_out": plan.left_out})


def _tip_kind(sets: JudgeSets) -> TipKind:
    return "points" if sets.points else "boxes" if sets.boxes else "none"


def _with_destroyed(sets: JudgeSets, seed: int) -> JudgeClips:
    """All clips of a part and, of each reconstruction with an instrument, a destroyed one."""
    clips, shown = sets.of(), sets.of("reconstructed")
    assert clips is not None
    return clips if shown is None else joined([clips, destroyed_clips(shown, seed)])


def _figures(net: JudgeNet, sets: JudgeSets, seed: int, temperatures: Any, names: tuple[str, ...]) -> dict[str, Any]:
    parts = {name: clips for name in ("reconstructed", "source") if (clips := sets.of(name)) is not None}
    everything = _with_destroyed(sets, seed)
    return judge_figures({name: answers(net, clips) for name, clips in parts.items()}, answers(net, everything),
                         temperatures, names)
