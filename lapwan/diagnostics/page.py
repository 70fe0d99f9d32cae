"""The page of `inspect-weights --page`: the verdict, the plot, and every table of the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from lapwan.diagnostics.inspect import Inspection
from lapwan.diagnostics.tables import verdict_lines
from lapwan.report.page import Bilingual, Block, Page, Plot, TextLines, rich_table


def inspection_page(
    inspected: Sequence[Path], inspection: Inspection, parts: Iterable[Table | str], command: str, settings: str
) -> Page:
    """The page of measured files.

    Args:
        inspected: the files or the folder.
        parts: what the terminal shows before the verdict: tables, and lines of text.
        command: what repeats it.
        settings: as TOML.
    """
    verdict = inspection.document["verdict"]
    blocks: list[Block] = [
        TextLines(Bilingual("Verdict", "结论"), tuple(verdict_lines(verdict)), verdict["status"]),
        Plot(Bilingual("Plots", "图表"), inspection.plot(), colour_scale=True),
    ]
    lines: list[str] = []
    for part in parts:
        if isinstance(part, str):
            lines.append(part)
        else:
            blocks.append(rich_table(part))
    if lines:
        blocks.append(TextLines(Bilingual("Notes", "说明"), tuple(lines)))
    facts = [(Bilingual("files", "文件"), ", ".join(map(str, inspected)))]
    if inspection.step is not None:
        facts.append((Bilingual("step", "步数"), str(inspection.step)))
    title = Bilingual("Weights of adapters", "适配器权重")
    return Page("inspect-weights", title, tuple(facts), tuple(blocks), command, settings)
