"""Regions as annotation tools write them: boxes in fractions or pixels, COCO, YOLO, labelme; one form inside lapwan.

A line of clips.jsonl has `roi`, a list of entries with `frame` and one of `box` (corners), `bbox` (COCO's [x, y, width,
height] in pixels) or `polygon`; or `roi_path`, a COCO or labelme file or a folder of YOLO or labelme files, each of a
frame.
`roi_units` says what numbers of `box` are. Entries come out with `frame`, `box` or `polygon`, `pixels` if they are not
fractions, and `track` if the tool tells objects apart; a `box` of null says that nothing is there.

How to add a format: a reader in `_READERS`, which returns such entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from lapwan.data.decoding.frame_files import frame_number, natural_key
from lapwan.documents import Number, checked, parse_json, read_text
from lapwan.errors import UserError, nearest

RoiUnits = Literal["fractions", "pixels", "coco", "yolo"]
UNITS: tuple[RoiUnits, ...] = ("fractions", "pixels", "coco", "yolo")
_SLACK = 0.01  # outside 0..1 by rounding
_FORM = "[x0, y0, x1, y1], corners as fractions of width and height"

RoiEntry = Mapping[str, Any]


def read_roi(
    data: Mapping[str, Any], location: str, source: Path, units: RoiUnits = "fractions"
) -> tuple[RoiEntry, ...]:
    """The regions of a line of clips.jsonl.

    Args:
        location: file and line, for messages.
        source: the JSONL file, beside which `roi_path` is looked for.
        units: of boxes where the line has no `roi_units`.

    Raises:
        UserError: an entry of another form, numbers that do not fit the units, or a file that cannot be read.
    """
    units = data.get("roi_units", units)
    if units not in UNITS:
        raise UserError(f"{location}: roi_units = {units!r}{nearest(str(units), UNITS)}; allowed: {', '.join(UNITS)}")
    roi, path = data.get("roi") or [], data.get("roi_path")
    if not isinstance(roi, list):
        raise UserError(f"{location}: 'roi' must be a list of {{\"frame\": i, \"box\": [x0, y0, x1, y1]}}")
    entries = [_entry(location, entry, units) for entry in roi]
    if path:
        beside = source.absolute().parent / str(path)
        entries += read_roi_file(beside if beside.exists() else Path(str(path)), location, data)
    return tuple(entries)


def _entry(location: str, entry: Any, units: RoiUnits) -> RoiEntry:
    frame = entry.get("frame") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(frame, int) or isinstance(frame, bool) or frame < 0:
        raise UserError(f"{location}: roi entry {entry!r} must be {{\"frame\": i, \"box\": [x0, y0, x1, y1]}}, corners "
                        "as fractions of width and height")
    track = {"track": str(entry["track"])} if entry.get("track") is not None else {}
    if "polygon" in entry:
        outline = entry["polygon"] or []
        if not isinstance(outline, list):
            raise UserError(f"{location}: 'polygon' = {outline!r} must be a list of points [x, y]")
        points = [_numbers(location, point, 2) for point in outline]
        pixels = units in ("pixels", "coco")
        _check_range(location, entry, [value for point in points for value in point], pixels)
        return {"frame": frame, "polygon": points, **track} | ({"pixels": True} if pixels else {})
    if "bbox" in entry:
        return _boxed(location, entry, frame, "coco", _numbers(location, entry["bbox"], 4)) | track
    if "box" in entry and entry["box"] is None:
        return {"frame": frame, "box": None, **track}
    values = _numbers(location, entry.get("box"), 4)
    if units == "fractions" and not track and set(entry) == {"frame", "box"}:
        _boxed(location, entry, frame, units, values)
        return entry  # as it is written: its cache stays valid
    return _boxed(location, entry, frame, units, values) | track


def _boxed(location: str, entry: Any, frame: int, units: RoiUnits, values: Sequence[float]) -> dict[str, Any]:
    x0, y0, x1, y1 = values
    if units == "coco":
        x1, y1 = x0 + x1, y0 + y1
    elif units == "yolo":
        centre_x, centre_y, width, height = values
        x0, y0, x1, y1 = centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2
    pixels = units in ("pixels", "coco")
    _check_range(location, entry, (x0, y0, x1, y1), pixels)
    if x1 < x0 or y1 < y0:
        hint = "; [x, y, width, height] is roi_units = \"coco\"" if pixels else ""
        raise UserError(f"{location}: roi entry {entry!r}: the second corner is left of or above the first; expected "
                        f"{_FORM}{hint}")
    return {"frame": frame, "box": [x0, y0, x1, y1]} | ({"pixels": True} if pixels else {})


def _numbers(location: str, values: Any, count: int) -> list[float]:
    good = isinstance(values, list | tuple) and len(values) == count and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not good:
        raise UserError(f"{location}: {values!r} in 'roi' must be {count} numbers; a box is {_FORM}")
    return [float(value) for value in values]


def _check_range(location: str, entry: Any, values: Sequence[float], pixels: bool) -> None:
    if not pixels and not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        hint = "looks like pixels: set roi_units = \"pixels\", or \"coco\" for [x, y, width, height]; it " if (
            max(values) > 2) else ""
        raise UserError(f"{location}: roi entry {entry!r} {hint}has numbers outside 0..1; expected {_FORM}")


def read_roi_file(path: Path, location: str, data: Mapping[str, Any] | None = None) -> list[RoiEntry]:
    """The regions of a COCO or labelme file, or of a folder of YOLO or labelme files, one a frame.

    A file's frame is the last number of its name, counted from 0 if there is a frame 0 and from 1 otherwise;
    `roi_first` of the line says it where the tool counted otherwise.

    Args:
        location: file and line of the clip, for messages.
        data: the clip's line.

    Raises:
        UserError: nothing there, a file of another format, or names without numbers.
    """
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in (".txt", ".json")
                        and file.name.lower() not in ("classes.txt", "captions.txt")),
                       key=lambda file: natural_key(file.stem))
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{location}: roi_path = '{path}': no such file or folder")
    if not files:
        raise UserError(f"{location}: roi_path = '{path}' holds no .txt (YOLO) or .json (labelme, COCO)")
    entries: list[tuple[int, dict[str, Any]]] = []
    for file in files:
        entries += _READERS[file.suffix.lower()](file, location, data or {})
    first = (data or {}).get("roi_first", min(1, min((number for number, _ in entries), default=0)))
    if not isinstance(first, int):
        raise UserError(f"{location}: roi_first = {first!r} must be the number of the first frame, 0 or 1")
    return [{"frame": number - first, **entry} for number, entry in entries if number >= first]


def _number_of(name: str, location: str) -> int:
    number = frame_number(name)
    if number is None:
        raise UserError(f"{location}: the name of '{name}' has no number, by which its frame is known")
    return number


def _text_of(file: Path, location: str) -> str:
    try:
        return read_text(file)
    except UserError as error:
        raise error.within(location) from None


def _yolo_file(file: Path, location: str, data: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Lines `class cx cy width height [confidence]`, or `class x1 y1 x2 y2 ...` of a polygon, in fractions."""
    number, entries = _number_of(file.name, location), []
    for row, line in enumerate(_text_of(file, location).splitlines(), 1):
        if not line.strip():
            continue
        try:
            _, *values = (float(part) for part in line.split())
        except ValueError:
            values = []
        where = f"{location}: {file.name}, line {row}"
        if len(values) in (4, 5):
            box = _boxed(where, line, number, "yolo", values[:4])
            entries.append((number, {"box": box["box"]}))
        elif len(values) >= 6 and len(values) % 2 == 0:
            _check_range(where, line, values, pixels=False)
            entries.append((number, {"polygon": list(zip(values[::2], values[1::2], strict=True))}))
        else:
            raise UserError(f"{where}: '{line.strip()[:60]}' is not YOLO's 'class cx cy width height'")
    return entries or [(number, {"box": None})]


def _json_file(file: Path, location: str, data: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    tree = parse_json(_text_of(file, location), f"{location}: {file}", non_finite=True)
    if isinstance(tree, dict) and "shapes" in tree:
        return _labelme(checked(tree, _LabelmeFile, f"{location}: {file}"), file, location)
    if isinstance(tree, dict) and {"images", "annotations"} <= set(tree):
        return _coco(checked(tree, _CocoFile, f"{location}: {file}"), file, location, data)
    raise UserError(f"{location}: {file} is neither labelme ('shapes') nor COCO ('images' and 'annotations')")


class _LabelmeShape(BaseModel):
    points: list[tuple[Number, Number]] = []
    shape_type: str = "polygon"
    group_id: Any = None


class _LabelmeFile(BaseModel):
    shapes: list[_LabelmeShape]
    imageWidth: Any = None
    imageHeight: Any = None


class _CocoImage(BaseModel):
    id: int | str | None = None
    file_name: str = ""
    frame_index: Any = None
    width: Any = None
    height: Any = None


class _CocoMark(BaseModel):
    image_id: int | str | None = None
    track_id: Any = None
    bbox: Any = None
    segmentation: Any = None  # polygons, or a run-length code, which is not read


class _CocoFile(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoMark]


def _labelme(tree: _LabelmeFile, file: Path, location: str) -> list[tuple[int, dict[str, Any]]]:
    number = _number_of(file.name, location)
    size = tree.imageWidth, tree.imageHeight
    entries = []
    for shape in tree.shapes:
        points = [[x, y] for x, y in shape.points]
        track = {"track": str(shape.group_id)} if shape.group_id is not None else {}
        if shape.shape_type == "rectangle" and len(points) >= 2:
            xs, ys = [x for x, _ in points], [y for _, y in points]
            entry: dict[str, Any] = {"box": [min(xs), min(ys), max(xs), max(ys)]}
        elif shape.shape_type == "polygon" and len(points) >= 3:
            entry = {"polygon": points}
        elif shape.shape_type == "circle" and len(points) == 2:
            (x, y), (edge_x, edge_y) = points
            radius = ((edge_x - x) ** 2 + (edge_y - y) ** 2) ** 0.5
            entry = {"box": [x - radius, y - radius, x + radius, y + radius]}
        else:
            continue  # points and lines enclose nothing
        entries.append((number, _fractions(entry, size) | track))
    return entries or [(number, {"box": None})]


def _coco(
    tree: _CocoFile, file: Path, location: str, data: Mapping[str, Any]
) -> list[tuple[int, dict[str, Any]]]:
    """Annotations of the images that belong to this clip, or of all, if none is named after it."""
    stem = Path(str(data.get("video_path") or "")).stem
    images = [image for image in tree.images if image.id is not None]
    named = [image for image in images if stem and _is_named_after(image.file_name, stem)]
    chosen = {image.id: image for image in named or images}
    numbers = {key: image.frame_index if type(image.frame_index) is int else
               _number_of(image.file_name or str(key), location) for key, image in chosen.items()}
    entries: list[tuple[int, dict[str, Any]]] = []
    for mark in tree.annotations:
        if mark.image_id not in chosen:
            continue
        image = chosen[mark.image_id]
        track = {"track": str(mark.track_id)} if mark.track_id is not None else {}
        outlines = mark.segmentation
        where = f"{location}: {file.name}"
        if isinstance(outlines, list) and outlines and isinstance(outlines[0], list):
            shapes: list[dict[str, Any]] = [{"polygon": _outline(where, flat)} for flat in outlines]
        else:
            x, y, width, height = _numbers(where, mark.bbox, 4)
            shapes = [{"box": [x, y, x + width, y + height]}]
        entries += [(numbers[mark.image_id], _fractions(shape, (image.width, image.height)) | track)
                    for shape in shapes]
    marked = {number for number, _ in entries}
    return entries + [(number, {"box": None}) for number in numbers.values() if number not in marked]


def _outline(location: str, flat: Any) -> list[list[float]]:
    """COCO's [x, y, x, y, ...] as points."""
    if not isinstance(flat, list) or len(flat) % 2:
        raise UserError(f"{location}: {flat!r} in 'segmentation' must be a list [x, y, x, y, ...]")
    values = _numbers(location, flat, len(flat))
    return [[x, y] for x, y in zip(values[::2], values[1::2], strict=True)]


def _is_named_after(name: str, stem: str) -> bool:
    """Whether a frame's file is in a folder called as its video, or its own name begins with the video's."""
    path = Path(name)
    return stem in path.parts or path.stem.startswith(stem)


def _fractions(entry: dict[str, Any], size: tuple[Any, Any]) -> dict[str, Any]:
    """An entry in pixels as fractions of the annotated picture's size, or marked as pixels if that is not known."""
    width, height = size
    if not (isinstance(width, int | float) and isinstance(height, int | float) and width > 0 and height > 0):
        return {**entry, "pixels": True}
    if "box" in entry:
        return {"box": [value / side for value, side in zip(entry["box"], (width, height) * 2, strict=True)]}
    return {"polygon": [[x / width, y / height] for x, y in entry["polygon"]]}


_READERS = {".txt": _yolo_file, ".json": _json_file}
