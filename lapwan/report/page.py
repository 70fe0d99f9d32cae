"""One self-contained page (HTML) of results: videos that play in step, tables, plots, settings, the command.

The page needs no network and no other program than a browser. Videos are embedded while the page stays small;
otherwise the page links to the files beside it. All text is escaped, and a link never leads out of the page's folder.
How to add a block: a dataclass in `Block` and its macro in `templates/page.html`.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image
from rich.table import Table
from rich.text import Text

from lapwan import console
from lapwan.files import atomic_file, leaves

PAGE_FILE = "report.html"
LARGEST_PAGE = 50_000_000  # bytes
_EMBEDDED = 40_000_000  # bytes of base64 up to which videos are embedded; the rest is for plots and text
_GENERATOR = b'<meta name="generator" content="lapwan">'
_TEMPLATES = Path(__file__).parent / "templates"
_TOO_LARGE = "too large for this page"
_MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


class Bilingual(NamedTuple):
    """A text of the page in its two languages."""

    en: str
    zh: str


REPEAT = Bilingual("Repeat", "重复运行")


@dataclass(frozen=True)
class Overlay:
    """What is known of a video besides its pixels.

    Args:
        verdict: what a judge sees in it, such as "hook 0.93".
        right: whether that is what was asked for; None: not known.
        mix: shares of a mixture's experts.
        source: what chose them, such as "router".
        tip: where a judge sees the tip in every frame, (x, y) in 0..1.
        figures: scores of the video by metric.
    """

    verdict: str = ""
    right: bool | None = None
    mix: tuple[tuple[str, float], ...] = ()
    source: str = ""
    tip: tuple[tuple[float, float], ...] = ()
    figures: tuple[tuple[str, float], ...] = ()

    @property
    def finite(self) -> dict[str, float]:
        """The figures that are numbers: JSON has no others."""
        return {name: value for name, value in self.figures if math.isfinite(value)}


@dataclass(frozen=True)
class VideoCell:
    """A video of a grid: its file, or the bytes of an MP4.

    Args:
        note: shown under it; where there is no video, why.
    """

    column: str
    path: Path | None = None
    data: bytes | None = None
    overlay: Overlay = Overlay()
    note: str = ""

    @property
    def mime(self) -> str | None:
        """Its type; None where a browser cannot show it."""
        return "video/mp4" if self.data is not None else _MEDIA.get(self.path.suffix.lower()) if self.path else None

    def size(self) -> int:
        """Bytes; 0 where there is nothing to show."""
        if self.mime is None:
            return 0
        if self.data is not None:
            return len(self.data)
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else 0


@dataclass(frozen=True)
class VideoRow:
    """Videos from the same noise, one a column.

    Args:
        family: what the filter by family compares.
        tip: the true tip in every frame, (x, y) in 0..1.
    """

    prompt: str
    cells: tuple[VideoCell, ...]
    label: str = ""
    family: str = ""
    note: str = ""
    tip: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class VideoGrid:
    """Rows of videos that play in step with all others of the page.

    Args:
        frames: of the longest video.
        size: height and width in pixels.
    """

    title: Bilingual
    rows: tuple[VideoRow, ...]
    frames: int
    fps: float
    size: tuple[int, int]
    note: Bilingual | None = None

    @property
    def metrics(self) -> list[str]:
        """Metrics by which the videos of a row can differ."""
        return list(dict.fromkeys(name for row in self.rows if len(row.cells) > 1 for cell in row.cells
                                  for name, _ in cell.overlay.figures))

    @property
    def judged(self) -> bool:
        """Whether several videos of a row have a verdict."""
        return any(sum(cell.overlay.right is not None for cell in row.cells) > 1 for row in self.rows)

    @property
    def columns(self) -> int:
        """Videos of the longest row."""
        return max((len(row.cells) for row in self.rows), default=0)


@dataclass(frozen=True)
class DataTable:
    """A table of texts; a row of one text is a heading inside it."""

    title: Bilingual
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    numeric: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Plot:
    """An image, such as of `plots.stacked`; inverted on a dark page unless its colours are a scale."""

    title: Bilingual
    image: Image.Image
    colour_scale: bool = False

    @property
    def data(self) -> str:
        """The PNG in base64."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG")
        return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class TextLines:
    """Short texts below each other; `status` is good, warn or stop, which colours the first."""

    title: Bilingual
    lines: tuple[str, ...]
    status: str = ""


@dataclass(frozen=True)
class PageLinks:
    """Links to files below the page's folder."""

    title: Bilingual
    links: tuple[tuple[str, Path], ...]


Block = VideoGrid | DataTable | Plot | TextLines | PageLinks


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        kind: the command that made it, such as "evaluate".
        command: what repeats it, or what `command_title` says.
        settings: TOML.
        running: it is written again while a run goes on: an open page reads itself again every minute.
    """

    kind: str
    title: Bilingual
    facts: tuple[tuple[Bilingual, str], ...]
    blocks: tuple[Block, ...]
    command: str = ""
    settings: str = ""
    running: bool = False
    command_title: Bilingual = REPEAT

    @property
    def grids(self) -> list[VideoGrid]:
        """The blocks of videos."""
        return [block for block in self.blocks if isinstance(block, VideoGrid)]

    @property
    def families(self) -> list[str]:
        """Families of all rows, in their order."""
        return list(dict.fromkeys(row.family for grid in self.grids for row in grid.rows if row.family))

    @property
    def judged(self) -> bool:
        """Whether the videos of a row can be compared by verdict."""
        return any(grid.judged for grid in self.grids)

    @property
    def metrics(self) -> list[str]:
        """Metrics of all grids by which the videos of a row can differ."""
        return list(dict.fromkeys(metric for grid in self.grids for metric in grid.metrics))

    @property
    def tips(self) -> bool:
        """Whether a tip is shown in any video."""
        return any(row.tip or any(cell.overlay.tip for cell in row.cells) for grid in self.grids for row in grid.rows)


@dataclass(frozen=True)
class _Source:
    """How a page reaches its videos."""

    folder: Path
    embed: bool

    def link(self, path: Path) -> str | None:
        """The relative link to a file; None for one outside of the page's folder."""
        if leaves(path, self.folder):
            return None
        return quote(os.fsencode(path.resolve().relative_to(self.folder.resolve()).as_posix()))

    def video(self, cell: VideoCell) -> dict[str, str] | None:
        """`data` in base64 or `href`, and `mime`; None if there is nothing to show."""
        if cell.mime is None or not cell.size():
            return None
        if cell.data is None and cell.path is not None and not self.embed:
            href = self.link(cell.path)
            return None if href is None else {"mime": cell.mime, "href": href}
        data = cell.data if cell.data is not None else cell.path.read_bytes() if cell.path is not None else b""
        return {"mime": cell.mime, "data": base64.b64encode(data).decode()}


def rich_table(table: Table, title: Bilingual | None = None) -> DataTable:
    """A table of the terminal as one of the page; its own title becomes the note, or the title where none is given."""
    name = _plain(table.title or "")
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    rows = []
    for row in zip(*columns, strict=True):
        heading = bool(row[0]) and not any(row[1:])
        rows.append((row[0],) if heading and len(row) > 1 else row)
    return DataTable(title or Bilingual(name or "Figures", name or "数据"),
                     tuple(_plain(column.header) for column in table.columns), tuple(rows), name if title else "",
                     tuple(column.justify == "right" for column in table.columns))


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def is_page(path: Path) -> bool:
    """Whether a file is a page that `write_page` has written."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return _GENERATOR in file.read(2000)


def load_template(name: str) -> Any:
    """A jinja2 template of `templates/`; all that it is given is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template(name)


def write_page(path: Path, page: Page, replace_any: bool = False) -> bool:
    """Write the page atomically; False if another file is at `path`, which stays.

    Videos are embedded if all of them fit. Of those that must be embedded, since they lie elsewhere or in memory, the
    first that fit are shown.

    Args:
        replace_any: any file at `path` is replaced, since the user has named it.
    """
    if (path.exists() or path.is_symlink()) and not replace_any and not is_page(path):
        console.warn(f"{path} is not a page of lapwan and stays; no page is written")
        return False
    cells = [cell for grid in page.grids for row in grid.rows for cell in row.cells]
    total = sum(map(_encoded, cells))
    source = _Source(path.parent, total <= _EMBEDDED)
    shown = page if source.embed else _within_budget(page)
    template = load_template("page.html")
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for piece in template.generate(page=shown, source=source, videos=sum(map(bool, map(_encoded, cells))),
                                       megabytes=total * 3 / 4 / 1e6):
            file.write(piece)
    return True


def _encoded(cell: VideoCell) -> int:
    """Characters of a video in base64."""
    return -(-cell.size() // 3) * 4


def _within_budget(page: Page) -> Page:
    """The page without videos in memory beyond what may be embedded; files are linked."""
    left = _EMBEDDED

    def kept(cells: Iterable[VideoCell]) -> Iterable[VideoCell]:
        nonlocal left
        for cell in cells:
            if cell.data is not None:
                left -= _encoded(cell)
            yield cell if cell.data is None or left >= 0 else replace(cell, data=None, note=_TOO_LARGE)

    def fitted(block: Block) -> Block:
        if not isinstance(block, VideoGrid):
            return block
        return replace(block, rows=tuple(replace(row, cells=tuple(kept(row.cells))) for row in block.rows))

    return replace(page, blocks=tuple(fitted(block) for block in page.blocks))
