"""A sheet of a dataset: one picture per clip with what becomes of it, as a page (HTML) or one image (PNG).

The page is one file without links: pictures are embedded as JPEG. It is written card by card, so memory does not grow
with the number of clips.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lapwan.files import atomic_file
from lapwan.report.contact_sheet import side_by_side
from lapwan.report.page import load_template

_COLUMNS, _TILE = 6, (240, 180)  # of the image; width and height of a picture in pixels
MOST_TILES = 300  # in an image; a page has no limit
_EMPTY, _DROPPED = (60, 60, 66), (214, 69, 65)


@dataclass(frozen=True)
class SheetCard:
    """A clip on a sheet.

    `picture` is a JPEG, None if there is none to show; `dropped` is why the clip is left out, None if it is used;
    `windows` are (start, length) of its items as shares of the clip; `details` and `notes` are short texts.
    """

    name: str
    caption: str
    label: str = ""
    bucket: str = ""
    dropped: str | None = None
    windows: tuple[tuple[float, float], ...] = ()
    details: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    picture: bytes | None = None

    @property
    def status(self) -> str:
        """`dropped`, `noted` or `used`."""
        return "dropped" if self.dropped is not None else "noted" if self.notes else "used"

    @property
    def data(self) -> str:
        """The picture in base64."""
        return base64.b64encode(self.picture or b"").decode()


@dataclass(frozen=True)
class SheetHead:
    """The top of a sheet: title, lines of facts, and what cards can be filtered by."""

    title: str
    facts: Sequence[tuple[str, str]]
    labels: Sequence[str]
    buckets: Sequence[str]


def write_html(path: Path, head: SheetHead, cards: Iterable[SheetCard]) -> None:
    """Write the page.

    Args:
        cards: read one by one, while the page is written.
    """
    template = load_template("dataset_sheet.html")
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for piece in template.generate(head=head, cards=cards):
            file.write(piece)


def write_png(path: Path, cards: Iterable[SheetCard]) -> None:
    """Write one image; a page is better for more than `MOST_TILES` clips."""
    shown = list(cards)
    captions = [f"DROPPED {card.dropped}: {card.name}" if card.dropped is not None else
                " | ".join(filter(None, (card.label, card.bucket, card.caption))) for card in shown]
    sheet = side_by_side([_tile(card)[None] for card in shown], captions, min(_COLUMNS, len(shown)))[0]
    with atomic_file(path) as temporary:
        Image.fromarray(sheet).save(temporary)


def _tile(card: SheetCard) -> np.ndarray:
    """The picture inside a tile of fixed size, uint8 [H, W, 3]; framed in red if the clip is dropped."""
    tile = Image.new("RGB", _TILE, _EMPTY)
    if card.picture is not None:
        with Image.open(io.BytesIO(card.picture)) as image:
            image.thumbnail(_TILE)
            tile.paste(image, ((_TILE[0] - image.width) // 2, (_TILE[1] - image.height) // 2))
    pixels: np.ndarray[Any, Any] = np.array(tile)
    if card.dropped is not None:
        pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:] = (_DROPPED,) * 4
    return pixels
