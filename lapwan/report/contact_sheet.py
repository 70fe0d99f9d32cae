"""Contact sheets (rows of frames of several videos in one image) and videos side by side."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lapwan import console

COLUMNS = 6  # frames shown of a video
_GAP, _MARGIN = 2, 6  # pixels
_BACKGROUND, _INK = (24, 24, 28), (235, 235, 235)
# Usual paths of fonts with Chinese glyphs, in this order. Without one, Chinese characters are left out.
_CJK_FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
    "/System/Library/Fonts/PingFang.ttc",
    "C:/Windows/Fonts/msyh.ttc",
)


def contact_sheet(videos: Sequence[np.ndarray], columns: int = COLUMNS, captions: Sequence[str] | None = None,
                  scale: int = 1) -> Image.Image:
    """One row per video: `columns` of its frames, evenly spaced from the first to the last, its caption above.

    Args:
        videos: uint8 RGB [T, H, W, 3] each; sizes may differ between rows.
        columns: frames shown of each video (fewer where a video has fewer).
        captions: one per video. Characters that no installed font can draw are left out.
        scale: integer enlargement of the frames, without smoothing.
    """
    if columns < 1 or not videos:
        raise ValueError(f"a sheet needs at least one video and one column, got {len(videos)} and {columns}")
    texts = list(captions) if captions is not None else [""] * len(videos)
    if len(texts) != len(videos):
        raise ValueError(f"{len(texts)} captions for {len(videos)} videos")
    rows = [_row(video, columns, scale) for video in videos]
    width = max(row.shape[1] for row in rows) + 2 * _MARGIN
    font, can_cjk = _font(size=14)
    texts = [_drawable(text, font, can_cjk, width - 2 * _MARGIN) for text in texts]
    line = 20 if any(texts) else 0
    height = sum(row.shape[0] + line + _MARGIN for row in rows) + _MARGIN
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    pen, top = ImageDraw.Draw(sheet), _MARGIN
    for row, text in zip(rows, texts, strict=True):
        if text:
            pen.text((_MARGIN, top), text, fill=_INK, font=font)
        sheet.paste(Image.fromarray(row), (_MARGIN, top + line))
        top += row.shape[0] + line + _MARGIN
    return sheet


def side_by_side(videos: Sequence[np.ndarray], captions: Sequence[str], columns: int, scale: int = 1) -> np.ndarray:
    """Videos playing side by side in a grid, each under its caption: uint8 [T, H, W, 3] of even height and width.

    Args:
        videos: uint8 RGB [T, H, W, 3], all of one shape.
        columns: videos in a row.
        scale: integer enlargement of the frames, without smoothing.
    """
    frames, height, width = videos[0].shape[:3]
    height, width = height * scale, width * scale
    font, can_cjk = _font(size=14)
    line = 20
    rows = -(-len(videos) // columns)
    shape = (rows * (line + height + _MARGIN) + _MARGIN, columns * (width + _MARGIN) + _MARGIN)
    background = Image.new("RGB", (shape[1] + shape[1] % 2, shape[0] + shape[0] % 2), _BACKGROUND)
    pen = ImageDraw.Draw(background)
    corners = [
        (_MARGIN + n // columns * (line + height + _MARGIN), _MARGIN + n % columns * (width + _MARGIN))
        for n in range(len(videos))
    ]
    for (top, left), text in zip(corners, captions, strict=True):
        pen.text((left, top), _drawable(text, font, can_cjk, width), fill=_INK, font=font)
    out = np.repeat(np.asarray(background)[None], frames, axis=0)
    for (top, left), video in zip(corners, videos, strict=True):
        enlarged = video.repeat(scale, axis=1).repeat(scale, axis=2)
        out[:, top + line : top + line + height, left : left + width] = enlarged
    return out


def spaced_frames(count: int, most: int = COLUMNS) -> np.ndarray:
    """At most `most` indices of `count` frames, evenly spaced from the first to the last."""
    indices: np.ndarray = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    return indices


def _row(video_THWC: np.ndarray, columns: int, scale: int) -> np.ndarray:
    chosen = spaced_frames(len(video_THWC), columns)
    frames = video_THWC[chosen].repeat(scale, axis=1).repeat(scale, axis=2)
    gap = np.full((frames.shape[1], _GAP, 3), _BACKGROUND, np.uint8)
    pieces = [piece for frame in frames for piece in (frame, gap)][:-1]
    return np.concatenate(pieces, axis=1)


def cjk_font() -> Path | None:
    """A font file with Chinese characters, if the system has one where distributions put them."""
    return next((path for path in map(Path, _CJK_FONTS) if path.is_file()), None)


def _font(size: int) -> tuple[ImageFont.ImageFont | ImageFont.FreeTypeFont, bool]:
    path = cjk_font()
    return (ImageFont.load_default(size), False) if path is None else (ImageFont.truetype(path, size), True)


@functools.cache
def _warn_no_cjk_font() -> None:
    console.warn("captions are drawn without their Chinese characters: no font with them was found; install one "
                 "(apt install fonts-noto-cjk)")


def _drawable(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, can_cjk: bool, width: int) -> str:
    """The part of `text` that the font can draw, truncated to `width` pixels; warns once about missing characters."""
    if not can_cjk and not text.isascii():
        _warn_no_cjk_font()
        text = "".join(c if c.isascii() else " " for c in text).rstrip(" :;,")
    text = " ".join(text.split())
    if not text or font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
