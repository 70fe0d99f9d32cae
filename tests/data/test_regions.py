"""Regions travel with the frames: same crop, same resampling, area fractions at latent resolution."""

from __future__ import annotations

import numpy as np
import pytest
from cache_clips import make_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapwan.data.buckets import centre_crop
from lapwan.data.dropped_clips import BadClip
from lapwan.data.regions import latent_region, mask_to_latent, region_shapes, shape_masks, shapes_at
from lapwan.data.video import probe


def box_masks(boxes, crop):
    roi = [{"frame": frame, "box": [*box]} for frame, some in enumerate(boxes) for box in some]
    return shape_masks(shapes_at(region_shapes(roi, crop.bucket), range(len(boxes))), crop)


def boxes_at(roi, frames):
    """Corners of the boxes at each frame, rounded."""
    return [[tuple(round(value, 6) for point in shape.points for value in point) for shape in shapes]
            for shapes in shapes_at(region_shapes(roi, (1, 1)), frames)]


fractions = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(fractions, fractions, st.sampled_from([(96, 64), (640, 480), (100, 300)]))
def test_area_is_exact(across, down, size):
    """The mask's sum is the box's area after resize and crop, in cells of 64 pixels."""
    crop = centre_crop(*size, (48, 32))
    box = (across[0], down[0], across[1], down[1])
    mask = mask_to_latent(box_masks([[box]], crop), 4, 8)
    x0, x1 = (np.clip(v * crop.resized[0] - crop.left, 0, 48) for v in across)
    y0, y1 = (np.clip(v * crop.resized[1] - crop.top, 0, 32) for v in down)
    assert mask.shape == (1, 4, 6)
    assert mask.sum() * 64 == pytest.approx((x1 - x0) * (y1 - y0), abs=0.02)
    assert mask.min() >= 0 and mask.max() <= 1 + 1e-6


def test_overlapping_boxes_count_once():
    crop = centre_crop(48, 32, (48, 32))
    one = box_masks([[(0, 0, 0.5, 0.5)]], crop)
    two = box_masks([[(0, 0, 0.5, 0.5), (0.25, 0, 0.5, 0.5)]], crop)
    np.testing.assert_allclose(one, two)


def test_latent_frames_average_their_four_frames():
    masks = np.zeros((9, 8, 8), np.float32)
    masks[0] = 1  # the first frame has a cell of its own
    masks[5:7] = 1  # two of the frames 5..8
    np.testing.assert_allclose(mask_to_latent(masks, 4, 8)[:, 0, 0], [1, 0, 0.5])


def box(frame, x):
    return {"frame": frame, "box": [x, 0, 1, 1]}


def test_dense_boxes_hold_for_their_frame_only():
    roi = [box(i, 0.1 * i) for i in range(6) if i != 3]
    assert boxes_at(roi, [2, 3, 4]) == [[(0.2, 0, 1, 1)], [], [(0.4, 0, 1, 1)]]


def test_sparse_boxes_move_in_a_straight_line():
    roi = [box(0, 0.0), box(10, 0.1), box(20, 0.3)]
    assert [at[0][0] for at in boxes_at(roi, [0, 5, 6, 10, 15, 20, 25])] == [0.0, 0.05, 0.06, 0.1, 0.2, 0.3, 0.3]
    assert boxes_at(roi, [26]) == [[]]  # half the usual gap after the last one
    assert boxes_at([box(4, 0.5)], [0, 80]) == [[(0.5, 0, 1, 1)]] * 2  # one box for the whole clip


def test_a_long_gap_is_not_bridged():
    roi = [box(frame, 0.0) for frame in (0, 10, 20, 60, 70)]
    assert [len(at) for at in boxes_at(roi, [15, 25, 26, 40, 54, 55, 65])] == [1, 1, 0, 0, 0, 1, 1]


def test_objects_are_paired_by_track_or_by_their_order():
    def at(frame, x, track=None):
        return {"frame": frame, "box": [x, 0, x, 0]} | ({} if track is None else {"track": track})

    assert boxes_at([at(0, 0.0), at(0, 0.5), at(4, 0.2), at(4, 0.9)], [2]) == [[(0.1, 0, 0.1, 0), (0.7, 0, 0.7, 0)]]
    crossed = [at(0, 0.0, "a"), at(0, 0.5, "b"), at(4, 0.9, "b"), at(4, 0.2, "a")]
    assert boxes_at(crossed, [2]) == [[(0.1, 0, 0.1, 0), (0.7, 0, 0.7, 0)]]
    leaves = [at(0, 0.0, "a"), at(0, 0.5, "b"), at(4, 0.2, "a")]
    assert [len(shapes) for shapes in boxes_at(leaves, [1, 2, 3])] == [2, 2, 1]
    assert boxes_at([at(0, 0.1), {"frame": 4, "box": None}, at(8, 0.1)], [1, 3, 4, 5, 7]) == [
        [(0.1, 0, 0.1, 0)], [], [], [], [(0.1, 0, 0.1, 0)]]


def test_boxes_follow_the_resampling(tmp_path):
    """At 32 fps, frame k of the model is source frame 2 k."""
    video = make_video(tmp_path / "a.mp4", frames=28, fps=32)
    facts = probe(video, 16)
    roi = [{"frame": i, "box": [0, 0, 1 if i >= 10 else 0, 1]} for i in range(28)]
    mask = latent_region(roi, None, video, range(9), centre_crop(96, 64, (96, 64)), 16, facts, None, (4, 8))
    # Model frames 5.. show source frames 10..: latent frame 1 is frames 1-4, latent frame 2 is 5-8.
    np.testing.assert_allclose(mask.mean(axis=(1, 2)), [0, 0, 1])


def test_mask_image_and_mask_video(tmp_path):
    video = make_video(tmp_path / "a.mp4", frames=12)
    facts, crop = probe(video, 16), centre_crop(96, 64, (48, 32))
    pixels = np.zeros((64, 96), np.uint8)
    pixels[:, 48:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = latent_region((), tmp_path / "mask.png", video, range(9), crop, 16, facts, None, (4, 8))
    np.testing.assert_allclose(mask, np.broadcast_to([0, 0, 0, 1, 1, 1], (3, 4, 6)))
    for classes in (pixels // 255 * 3, np.where(pixels[..., None] > 0, (128, 0, 0), 0).astype(np.uint8)):
        Image.fromarray(classes).save(tmp_path / "classes.png")
        same = latent_region((), tmp_path / "classes.png", video, range(9), crop, 16, facts, None, (4, 8))
        assert np.abs(same - mask).max() <= 0.2  # an edge is not softened
    (tmp_path / "masks").mkdir()
    for index in range(12):
        Image.fromarray(np.full((64, 96), 255 * (index >= 5), np.uint8)).save(tmp_path / "masks" / f"{index:02d}.png")
    mask = latent_region((), tmp_path / "masks", video, range(9), crop, 16, facts, None, (4, 8))
    np.testing.assert_allclose(mask.mean(axis=(1, 2)), [0, 0, 1])
    with pytest.raises(BadClip, match="no such file"):
        latent_region((), tmp_path / "none.png", video, range(9), crop, 16, facts, None, (4, 8))
