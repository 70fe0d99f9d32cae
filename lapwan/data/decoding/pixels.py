"""From decoded video frames to upright RGB: fields, colour matrix and range, transparency, rotation and mirroring.

Colours are FFmpeg's: the matrix and range of the file's tags, BT.601 limited where it has none. `ReadOptions` says
what is done to interlaced and HDR material and to transparent pixels, `file_traits` what a file has of these, and
`treatment_of` what follows. No torch until an HDR frame is tone-mapped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lapwan.data.decoding.images import composite
from lapwan.data.dropped_clips import BadClip

if TYPE_CHECKING:
    from PIL import Image

Deinterlacing = Literal["auto", "always", "never"]
HdrHandling = Literal["refuse", "tonemap"]
Background = Literal["black", "white"]
_HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of SMPTE ST 2084 and ARIB STD-B67
_INTERLACED = (2, 3, 4, 5)  # FFmpeg's numbers of the field orders TT, BB, TB, BT
_DISTORTED = 0.01  # pixels less than 1 % off square are rounding of whoever wrote the file
# swscale's flags BILINEAR, FULL_CHR_H_INT and ACCURATE_RND: without them, more than 8 bits come out up to 4 levels off.
_ACCURATE = 0x2 | 0x2000 | 0x40000
_WIDEST = 8  # times as wide as high, or the reverse: beyond, the aspect ratio is a mistake


@dataclass(frozen=True)
class ReadOptions:
    """How clips are read: fields to frames (by the file's flags, or whatever they say), HDR, transparency."""

    deinterlace: Deinterlacing = "auto"
    hdr: HdrHandling = "refuse"
    background: Background = "black"


def file_traits(stream: Any, frame: Any) -> str:
    """What a video file is, from its header and first frame, as words with commas: interlaced, PQ, HLG, alpha."""
    traits = []
    if frame.interlaced_frame or getattr(stream.codec_context, "field_order", 0) in _INTERLACED:
        traits.append("interlaced")
    transfer = getattr(frame, "color_trc", None)
    if (name := _HDR.get(transfer if transfer is not None else stream.codec_context.color_trc)) is not None:
        traits.append(name)
    # Every GIF and many ProRes files have an alpha channel; what matters is whether anything shows through.
    if has_alpha_channel(frame) and int(frame.to_ndarray(format="rgba")[..., 3].min()) < 255:
        traits.append("alpha")
    if _matrix_mirrors(display_matrix(frame)):
        traits.append("mirrored")
    return ",".join(traits)


def treatment_of(traits: str, square: bool, options: ReadOptions, video: bool = True) -> str:
    """What is done to the pixels of a file beyond decoding, as words with commas, for its recipe and the plan.

    Args:
        traits: of `file_traits`, or of `image_traits`.
        square: its pixels are square.
        video: it has frames that may be interlaced.

    Raises:
        BadClip: an HDR video, unless it is to be tone-mapped.
    """
    has = traits.split(",")
    steps = []
    if video and (options.deinterlace == "always" or (options.deinterlace == "auto" and "interlaced" in has)):
        steps.append("yadif")
    for name in _HDR.values():
        if name in has:
            if options.hdr == "refuse":
                raise BadClip(f"HDR ({name}): the models are trained on SDR; set hdr = \"tonemap\" to tone-map it to "
                              "BT.709, or convert it")
            steps.append(f"{name} tone-mapped")
    if not square:
        steps.append("square pixels")
    if "mirrored" in has:
        steps.append("mirrored")
    if "16 bits" in has:
        steps.append("16 bits scaled")
    if "alpha" in has:
        steps.append(f"alpha over {options.background}")
    return ",".join(steps)


def pixel_aspect(stream: Any, frame: Any) -> Fraction:
    """Width of a pixel over its height, by the container before the codec; 1 where it is missing, absurd or near 1."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
    ratio = Fraction(aspect)
    near = abs(float(ratio) - 1) < _DISTORTED
    return Fraction(1) if near or not Fraction(1, _WIDEST) <= ratio <= _WIDEST else ratio


def display_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """(width, height) with square pixels; the smaller side grows, so that no detail is lost.

    Args:
        width, height: as stored.
        aspect: width of a pixel over its height.
    """
    if aspect >= 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def has_alpha_channel(frame: Any) -> bool:
    """Whether a frame's pixel format has alpha, or a palette, which may have it."""
    return frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)


def display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Signs (a, b, c, d) of a frame's display matrix, x' = a·x + c·y, y' = b·x + d·y; None without one."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    largest = max(map(abs, (a, b, c, d))) or 1
    signs = (round(a / largest), round(b / largest), round(c / largest), round(d / largest))
    # Players show other angles than multiples of 90 degrees unturned, too.
    return signs if [abs(sign) for sign in signs] in ([1, 0, 0, 1], [0, 1, 1, 0]) else None


def _matrix_mirrors(matrix: tuple[int, int, int, int] | None) -> bool:
    return matrix is not None and matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0


def turns_sideways(frame: Any) -> bool:
    """Whether width and height change places on display."""
    matrix = display_matrix(frame)
    return matrix is not None and matrix[0] == 0


def oriented(pixels_HW3: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Pixels as the display matrix shows them: output (x', y') = matrix · input (x, y), in steps of 90 degrees."""
    if matrix is None or matrix == (1, 0, 0, 1):
        return pixels_HW3
    a, b, c, d = matrix
    if a == 0 and d == 0:
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
        a, d = c, b  # x' = c·y, y' = b·x
    if a < 0:
        pixels_HW3 = pixels_HW3[:, ::-1]
    if d < 0:
        pixels_HW3 = pixels_HW3[::-1]
    return np.ascontiguousarray(pixels_HW3)


def rgb_frame(frame: Any, treatment: str) -> Image.Image:
    """An upright RGB picture of a decoded frame."""
    from PIL import Image

    if "tone-mapped" in treatment:
        from lapwan.data.decoding.hdr import tone_mapped

        # Not through `_converted`: its flags lose the green of 16-bit output.
        pixels = tone_mapped(frame.to_ndarray(format="rgb48le"), "PQ" if "PQ" in treatment else "HLG")
    elif has_alpha_channel(frame):
        pixels = composite(_converted(frame, "rgba"), "white" if "over white" in treatment else "black")
    else:
        pixels = _converted(frame, "rgb24")
    return Image.fromarray(oriented(pixels, display_matrix(frame)))


def _converted(frame: Any, pixel_format: str) -> np.ndarray:
    deep = any(part.bits > 8 for part in frame.format.components)
    pixels: np.ndarray = frame.to_ndarray(format=pixel_format, interpolation=_ACCURATE if deep else None)
    return pixels


def deinterlaced(frames: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
    """Each pair of fields as one frame, by FFmpeg's yadif: the frame's first field kept, the other interpolated.

    yadif returns a frame for each, one later; their times are kept.
    """
    graph: Any = None
    times: list[float] = []
    shape: tuple[Any, ...] = ()
    for at, frame in frames:
        if graph is None or shape != (frame.width, frame.height, frame.format.name):
            yield from _rest(graph, times)
            graph, shape = _yadif(frame), (frame.width, frame.height, frame.format.name)
        times.append(at)
        graph.vpush(frame)
        yield from _pulled(graph, times)
    yield from _rest(graph, times)


def _yadif(frame: Any) -> Any:
    import av

    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
        graph.add("yadif", "mode=send_frame:parity=auto:deint=all"), graph.add("buffersink"),
    ).configure()
    return graph


def _rest(graph: Any, times: list[float]) -> Iterator[tuple[float, Any]]:
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph, times)


def _pulled(graph: Any, times: list[float]) -> Iterator[tuple[float, Any]]:
    import av

    while times:
        try:
            frame = graph.vpull()
        except (BlockingIOError, av.EOFError):  # it needs the next frame, or has ended
            return
        yield times.pop(0), frame
