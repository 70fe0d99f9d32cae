"""Regions as annotation tools write them come out as corners or polygons; numbers that do not fit are named."""

from __future__ import annotations

import json

import pytest

from lapwan.data.annotations import read_roi
from lapwan.data.regions import region_shapes
from lapwan.errors import UserError


def shapes(data, tmp_path, size=(100, 50), units="fractions"):
    """Points by frame, rounded, in fractions of `size`."""
    roi = read_roi(data, "clips.jsonl, line 3", tmp_path / "clips.jsonl", units)
    return {frame: [[tuple(round(v, 4) for v in point) for point in shape.points] for shape in some]
            for frame, some in region_shapes(roi, size).items()}


@pytest.mark.parametrize(("units", "box"), [
    ("fractions", [0.2, 0.2, 0.6, 0.8]), ("pixels", [20, 10, 60, 40]), ("coco", [20, 10, 40, 30]),
    ("yolo", [0.4, 0.5, 0.4, 0.6]),
])
def test_units(tmp_path, units, box):
    expected = {4: [[(0.2, 0.2), (0.6, 0.8)]]}
    assert shapes({"roi_units": units, "roi": [{"frame": 4, "box": box}]}, tmp_path) == expected
    assert shapes({"roi": [{"frame": 4, "box": box}]}, tmp_path, units=units) == expected
    assert shapes({"roi": [{"frame": 4, "bbox": [20, 10, 40, 30]}]}, tmp_path) == expected


def test_plain_boxes_stay_as_they_are_written(tmp_path):
    """Their fingerprint, and with it the cache of their region, stays valid."""
    entry = {"frame": 0, "box": [0, 0, 1, 1]}
    assert read_roi({"roi": [entry]}, "x", tmp_path / "c.jsonl") == (entry,)


@pytest.mark.parametrize(("data", "message"), [
    ({"roi": [{"frame": 0, "box": [10, 20, 100, 120]}]}, r"line 3.*looks like pixels.*roi_units = \"pixels\""),
    ({"roi": [{"frame": 0, "box": [0.5, 0.5, 1.2, 0.9]}]}, r"outside 0\.\.1"),
    ({"roi": [{"frame": 0, "box": [-0.2, 0.5, 0.9, 0.9]}]}, r"outside 0\.\.1"),
    ({"roi": [{"frame": 0, "box": [0.9, 0, 0.1, 1]}]}, "second corner"),
    ({"roi": [{"frame": 0, "box": [50, 10, 20, 40]}], "roi_units": "pixels"}, r"\"coco\""),
    ({"roi": [{"frame": 0, "box": [0, 1]}]}, "4 numbers"),
    ({"roi": [{"frame": -1, "box": [0, 0, 1, 1]}]}, "roi entry"),
    ({"roi": [{"box": [0, 0, 1, 1]}]}, "roi entry"),
    ({"roi": {"frame": 0}}, "must be a list"),
    ({"roi": [], "roi_units": "pixel"}, "did you mean 'pixels'"),
    ({"roi_path": "nothing"}, "no such file"),
])
def test_what_does_not_fit_is_named(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        read_roi(data, "clips.jsonl, line 3", tmp_path / "clips.jsonl")


def test_rounding_outside_the_frame_is_forgiven(tmp_path):
    assert shapes({"roi": [{"frame": 0, "box": [-0.004, 0, 1.004, 1]}]}, tmp_path)


def test_yolo_folder(tmp_path):
    """One file a frame, counted from 1 as Ultralytics and ffmpeg do; polygons of segmentation too."""
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "clip_1.txt").write_text("0 0.4 0.5 0.4 0.6\n")
    (folder / "clip_3.txt").write_text("0 0.5 0.5 1 1 0.93\n2 0.1 0.1 0.9 0.1 0.5 0.8\n")
    (folder / "clip_10.txt").write_text("")
    (folder / "classes.txt").write_text("hook\n")
    assert shapes({"roi_path": "labels"}, tmp_path) == {
        0: [[(0.2, 0.2), (0.6, 0.8)]], 2: [[(0, 0), (1, 1)], [(0.1, 0.1), (0.9, 0.1), (0.5, 0.8)]], 9: []}
    assert set(shapes({"roi_path": "labels", "roi_first": 0}, tmp_path)) == {1, 3, 10}
    (folder / "clip_4.txt").write_text("0 20 10 40 30\n")
    with pytest.raises(UserError, match=r"clip_4\.txt, line 1.*looks like pixels"):
        shapes({"roi_path": "labels"}, tmp_path)
    (folder / "clip_4.txt").write_text("hook here\n")
    with pytest.raises(UserError, match="is not YOLO"):
        shapes({"roi_path": "labels"}, tmp_path)


def test_labelme(tmp_path):
    """Polygons, rectangles and circles, in pixels of the size that the file names; lines enclose nothing."""
    marks = [{"shape_type": "polygon", "points": [[0, 0], [100, 0], [50, 50]], "label": "hook"},
             {"shape_type": "rectangle", "points": [[60, 40], [20, 10]], "group_id": 7},
             {"shape_type": "circle", "points": [[50, 25], [60, 25]]},
             {"shape_type": "line", "points": [[0, 0], [1, 1]]}]
    path = tmp_path / "f_0000.json"
    path.write_text(json.dumps({"shapes": marks, "imageWidth": 100, "imageHeight": 50}))
    # Fractions do not depend on the size of the clip, which may have been resized since.
    assert shapes({"roi_path": path.name}, tmp_path, size=(400, 200)) == {
        0: [[(0, 0), (1, 0), (0.5, 1)], [(0.2, 0.2), (0.6, 0.8)], [(0.4, 0.3), (0.6, 0.7)]]}
    assert read_roi({"roi_path": path.name}, "x", tmp_path / "c.jsonl")[1]["track"] == "7"


def test_coco_file_of_several_videos(tmp_path):
    images = [{"id": 1, "file_name": "a/000.png", "width": 100, "height": 50}, {"id": 2, "file_name": "a/004.png",
              "width": 100, "height": 50}, {"id": 3, "file_name": "b/000.png", "width": 100, "height": 50},
              {"id": 4, "file_name": "a/008.png", "width": 100, "height": 50}]
    marks = [{"image_id": 1, "bbox": [20, 10, 40, 30]}, {"image_id": 3, "bbox": [0, 0, 1, 1]},
             {"image_id": 2, "segmentation": [[0, 0, 100, 0, 50, 50]], "bbox": [0, 0, 100, 50]}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": marks}))
    assert shapes({"video_path": "clips/a.mp4", "roi_path": "coco.json"}, tmp_path) == {
        0: [[(0.2, 0.2), (0.6, 0.8)]], 4: [[(0, 0), (1, 0), (0.5, 1)]], 8: []}


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a_1.json").write_text("[]")
    with pytest.raises(UserError, match="neither labelme"):
        shapes({"roi_path": "a_1.json"}, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.txt"):
        shapes({"roi_path": "empty"}, tmp_path)


@pytest.mark.parametrize(("tree", "message"), [
    ({"shapes": 3}, "shapes = 3"), ({"shapes": [3]}, r"shapes\[0\]"), ({"shapes": [{"points": 5}]}, "points = 5"),
    ({"images": [], "annotations": 3}, "annotations = 3"),
    ({"images": [{"id": [1]}], "annotations": []}, r"images\[0\]\.id"),
    ({"images": [{"id": 1, "file_name": "f_1.png"}], "annotations": [{"image_id": 1, "segmentation": [[1, 2, 3]]}]},
     "segmentation"),
    ({"images": [{"id": 1, "file_name": "f_1.png"}], "annotations": [{"image_id": 1, "segmentation": [["x", 2]]}]},
     "must be 2 numbers"),
    ({"images": [{"id": 1, "file_name": "f_1.png"}], "annotations": [{"image_id": 1}]}, "must be 4 numbers"),
])
def test_files_of_a_wrong_form_are_named(tmp_path, tree, message):
    (tmp_path / "a_1.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match=rf"line 3: .*a_1\.json.*{message}|line 3: .*{message}"):
        read_roi({"roi_path": "a_1.json"}, "clips.jsonl, line 3", tmp_path / "clips.jsonl")


def test_a_polygon_that_is_no_list(tmp_path):
    with pytest.raises(UserError, match=r"line 3: 'polygon' = 5"):
        read_roi({"roi": [{"frame": 0, "polygon": 5}]}, "clips.jsonl, line 3", tmp_path / "clips.jsonl")
