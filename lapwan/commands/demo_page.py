"""The page that ends `lapwan demo`: what each stage gave, and the videos of all stages in step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lapwan.data.labels import label_caption
from lapwan.data.taxonomy import load_taxonomy
from lapwan.diagnostics.run_folder import metrics
from lapwan.evaluation.videos import video_path
from lapwan.models.spec import read_spec
from lapwan.report.page import (
    PAGE_FILE,
    Bilingual,
    Block,
    Overlay,
    Page,
    PageLinks,
    Plot,
    VideoCell,
    VideoGrid,
    VideoRow,
    rich_table,
)
from lapwan.tiny.model import tiny_folder
from lapwan.train.callbacks.run_page import run_charts

WEIGHTS_PAGE = "weights.html"  # of the inspected LoRAs, beside the page
_TASKS = {"T2V": Bilingual("Text to video", "文本生成视频"), "I2V": Bilingual("Image to video", "图像生成视频")}
_RUNS = {"stage1": Bilingual("Training: stage 1", "训练：第一阶段"),
         "stage2": Bilingual("Training: stage 2", "训练：第二阶段")}


def demo_page(out: Path, tables: Sequence[Table], evaluations: Mapping[str, Mapping[str, Any]], settings: str) -> Page:
    """The page of a finished demo in the folder `out`.

    Args:
        tables: of the stages, and of identity and tip by adapter.
        evaluations: evaluation.json by `T2V` and `I2V`.
        settings: as TOML.
    """
    stages, comparison = tables
    folders = {task: out / task.lower() for task in evaluations}
    blocks: list[Block] = [rich_table(comparison, Bilingual("Adapters compared", "适配器比较"))]
    blocks += [_videos(_TASKS[task], folders[task], document) for task, document in evaluations.items()]
    blocks += [Plot(title, charts) for name, title in _RUNS.items() if (charts := run_charts(metrics(out / name)))]
    blocks.append(rich_table(stages, Bilingual("Stages", "各阶段")))
    links = [(f"{_TASKS[task].en} · {_TASKS[task].zh}: {folder.name}/{PAGE_FILE}", folder / PAGE_FILE)
             for task, folder in folders.items()]
    links.append((f"Weights of stage 1 · 第一阶段的权重: {WEIGHTS_PAGE}", out / WEIGHTS_PAGE))
    blocks.append(PageLinks(Bilingual("More", "更多"), tuple(links)))
    facts = ((Bilingual("folder", "文件夹"), str(out)),)
    title = Bilingual("The whole pipeline on the embedded model", "内置模型上的完整流程")
    return Page("demo", title, facts, tuple(blocks), "lapwan demo", settings)


def _videos(title: Bilingual, folder: Path, document: Mapping[str, Any]) -> VideoGrid:
    """Every video of an evaluation, adapters in columns."""
    taxonomy, defaults = load_taxonomy("surgical4"), read_spec(tiny_folder("t2v")).defaults
    rows = []
    for p, clip in enumerate(document["clips"]):
        weights = label_caption(clip["prompt"], taxonomy).weights
        family = taxonomy.keys[weights.index(max(weights))]
        cells = []
        for arm in document["adapters"]:
            figures = {metric: values[p][0] for metric, values in document["scores"][arm].items()
                       if values[p][0] is not None}
            right = figures.get("identity")
            cells.append(VideoCell(arm, video_path(folder / "videos", arm, clip["id"], 0), overlay=Overlay(
                right=None if right is None else right >= 0.5, figures=tuple(figures.items()))))
        rows.append(VideoRow(clip["prompt"], tuple(cells), family, family))
    note = Bilingual("A row has the same prompt and noise. ✓: the named instrument is seen.",
                     "同一行使用相同的提示词和噪声。✓：识别出所要求的器械。")
    return VideoGrid(title, tuple(rows), defaults.num_frames, defaults.fps, defaults.size, note)
