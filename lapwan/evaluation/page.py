"""The page of an evaluation: tables with intervals, and every video with what the judge sees, adapters in columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lapwan import console
from lapwan.console import count_text
from lapwan.errors import UserError
from lapwan.evaluation.arms import Arm
from lapwan.evaluation.clips import EvaluationClip, VideoShape, evenly_spaced
from lapwan.evaluation.metrics import DescribingJudge, JudgeMetrics, Seen
from lapwan.evaluation.plots import draw_plot
from lapwan.evaluation.study import Study, StudyResults
from lapwan.evaluation.tables import IntervalRule, tables
from lapwan.evaluation.videos import VideoStore
from lapwan.report.page import (
    Bilingual,
    Block,
    Overlay,
    Page,
    Plot,
    VideoCell,
    VideoGrid,
    VideoRow,
    rich_table,
)
from lapwan.sampling.start_image import read_clip

_MOST_VIDEOS = 1500  # on a page: of more clips some are left out, evenly
_TABLES = {0: Bilingual("Figures", "指标"), 1: Bilingual("Routing", "路由")}


def evaluation_page(
    study: Study, results: StudyResults, interval: IntervalRule, store: VideoStore, command: str, settings: str
) -> Page:
    """The page of a finished evaluation.

    Args:
        store: of its videos.
        command: what repeats it.
        settings: as TOML.
    """
    spec, names = study.arms[0].base.spec, [arm.name for arm in study.arms]
    facts = [(Bilingual("model", "模型"), f"{spec.path} ({spec.task})"),
             (Bilingual("adapters", "适配器"), f"{len(names)}: {', '.join(names)}")]
    blocks: list[Block] = [
        rich_table(table, _TABLES[int(bool(n) or not (results.losses or results.scores))])
        for n, table in enumerate(tables(study, results, interval))]
    if study.sampling is not None:
        s = study.sampling
        facts.append((Bilingual("videos", "视频"), (
            f"{count_text(len(study.clips), 'clip')} x {count_text(s.seeds, 'seed')} per adapter, {s.shape.frames} "
            f"frames {s.shape.size[0]}x{s.shape.size[1]} at {s.shape.fps} fps, {s.sampler}, {s.steps} steps")))
        blocks.append(_videos(study, results, store))
    facts.append((Bilingual("intervals", "区间"), f"{100 * interval.level:g} %, bootstrap over clips"))
    blocks.append(Plot(Bilingual("Plots", "图表"), draw_plot(study, results, interval)))
    title = Bilingual("Adapters compared", "适配器比较")
    return Page("evaluate", title, tuple(facts), tuple(blocks), command, settings)


def _videos(study: Study, results: StudyResults, store: VideoStore) -> VideoGrid:
    assert study.sampling is not None
    s = study.sampling
    chosen = evenly_spaced(list(enumerate(study.clips)), max(1, _MOST_VIDEOS // (len(study.arms) * s.seeds)))
    rows = []
    with console.progress("page", len(chosen) * s.seeds, "row") as bar:
        for p, clip in chosen:
            for seed in range(s.seeds):
                cells = tuple(_cell(study, results, store, arm, p, seed) for arm in study.arms)
                rows.append(VideoRow(clip.prompt, cells, _label(study, clip), _family(study, clip),
                                     f"seed {seed}" if s.seeds > 1 else "", _true_tip(study, clip, s.shape)))
                bar.advance()
    note = Bilingual("A row has the same prompt and noise.", "同一行使用相同的提示词和噪声。")
    return VideoGrid(Bilingual("Videos", "视频"), tuple(rows), s.shape.frames, s.shape.fps, s.shape.size, note)


def _cell(study: Study, results: StudyResults, store: VideoStore, arm: Arm, p: int, seed: int) -> VideoCell:
    """The video of an arm for clip number `p`, with its scores and what the judge sees in it."""
    assert study.sampling is not None
    clip = study.clips[p]
    path = store.path(arm, clip, seed)
    figures = {name: float(values[p, seed]) for name, values in results.scores[arm.name].items()
               if math.isfinite(values[p, seed])}
    right = figures.get("identity")
    seen = _seen(study, path, clip)
    verdict = "" if seen is None else f"{seen.name} {seen.share:.2f}"
    tip = () if seen is None or seen.tips_T2 is None else _points(seen.tips_T2)
    mixes = results.mixes.get(arm.name)
    overlay = Overlay(
        verdict, None if right is None else right >= 0.5, tuple(mixes[p].shares().items()) if mixes else (),
        mixes[p].source if mixes else "", tip, tuple(figures.items()))
    return VideoCell(arm.name, path, overlay=overlay)


def _seen(study: Study, path: Path, clip: EvaluationClip) -> Seen | None:
    """What the judge sees in a stored video; None without a judge, or if the file has been damaged since."""
    assert study.sampling is not None
    judge, shape = _judge(study), study.sampling.shape
    try:
        return None if judge is None else judge.describe(read_clip(path, shape.frames, shape.size, shape.fps), clip)
    except UserError:
        return None


def _judge(study: Study) -> DescribingJudge | None:
    """The judge of the videos, if they are judged and it says what it sees."""
    judges = [scorer.judge for scorer in study.scorers if isinstance(scorer, JudgeMetrics)]
    return judges[0] if judges and isinstance(judges[0], DescribingJudge) else None


def _true_tip(study: Study, clip: EvaluationClip, shape: VideoShape) -> tuple[tuple[float, float], ...]:
    """The clip's tip, where the video's follows from its first frame."""
    if clip.tips_T2 is None or not study.arms[0].base.spec.requires_image:
        return ()
    return _points(clip.tips_T2[: shape.frames])


def _family(study: Study, clip: EvaluationClip) -> str:
    keys = study.taxonomy.keys
    return keys[int(np.argmax(clip.weights))] if len(clip.weights) == len(keys) and not clip.fallback else ""


def _label(study: Study, clip: EvaluationClip) -> str:
    """The instrument, else the label's families with their weights."""
    if clip.instrument:
        return clip.instrument
    named: Sequence[tuple[str, float]] = [
        (key, weight) for key, weight in zip(study.taxonomy.keys, clip.weights, strict=False) if weight > 0]
    return " ".join(key if weight == 1 else f"{key} {weight:.2f}" for key, weight in named) if not clip.fallback else ""


def _points(tips_T2: np.ndarray) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in tips_T2)
