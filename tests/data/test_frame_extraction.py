"""Windows and buckets against the written rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapwan.data.buckets import Buckets, centre_crop
from lapwan.data.frame_extraction import Window, frame_windows

counts = st.integers(1, 400)
targets = st.lists(st.integers(1, 130), min_size=1, max_size=4)


def rounded(values):
    return sorted({(v - 1) // 4 * 4 + 1 for v in values})


@given(counts, targets)
def test_head_is_the_first_frames_of_every_target_that_fits(count, wanted):
    assert frame_windows(count, "head", wanted) == [Window(0, t) for t in rounded(wanted) if t <= count]


@given(counts, targets)
def test_chunks_tile_from_the_start_and_stay_whole(count, wanted):
    found = frame_windows(count, "chunk", wanted)
    assert found == [Window(k * t, t) for t in rounded(wanted) for k in range(count // t)]


@given(counts, targets, st.integers(1, 50))
def test_slide_starts_every_stride(count, wanted, stride):
    found = frame_windows(count, "slide", wanted, frame_stride=stride)
    assert found == [Window(s, t) for t in rounded(wanted) for s in range(count) if s % stride == 0 and s + t <= count]


@given(counts, targets, st.integers(2, 40))
def test_uniform_starts_as_numpy_spaces_them(count, wanted, samples):
    expected = [
        Window(int(s), t) for t in rounded(wanted) if t <= count
        for s in dict.fromkeys(np.linspace(0, count - t, samples, dtype=int).tolist())
    ]
    assert frame_windows(count, "uniform", wanted, frame_sample=samples) == expected


@given(counts, targets)
def test_one_uniform_sample_is_head(count, wanted):
    assert frame_windows(count, "uniform", wanted, frame_sample=1) == frame_windows(count, "head", wanted)


@given(counts, st.integers(1, 200))
def test_full_is_one_window_rounded_down(count, most):
    (window,) = frame_windows(count, "full", (1,), max_frames=most)
    assert window.start == 0 and window.frames % 4 == 1
    assert window.frames <= min(count, most) < window.frames + 4


@given(counts, targets, st.sampled_from(["head", "chunk", "slide", "uniform", "full"]), st.integers(1, 9),
       st.integers(1, 9))
def test_every_window_lies_in_the_clip_once(count, wanted, extraction, stride, samples):
    found = frame_windows(count, extraction, wanted, stride, samples)
    assert len(set(found)) == len(found)
    assert all(w.start >= 0 and w.start + w.frames <= count and w.frames % 4 == 1 for w in found)


@pytest.mark.parametrize(("extraction", "expected"), [
    ("head", [(0, 13), (0, 25)]),
    ("chunk", [(0, 13), (13, 13), (26, 13), (0, 25)]),
    ("slide", [(0, 13), (10, 13), (20, 13), (0, 25), (10, 25)]),
    ("uniform", [(0, 13), (9, 13), (18, 13), (27, 13), (0, 25), (5, 25), (10, 25), (15, 25)]),
    ("full", [(0, 37)]),
])
def test_a_clip_of_40_frames(extraction, expected):
    """Worked by hand from the rule: targets 13 and 25 (27 rounds down), stride 10, four samples."""
    found = frame_windows(40, extraction, (13, 27), frame_stride=10, frame_sample=4)
    assert [tuple(w) for w in found] == expected


def reference_buckets(width, height):
    """The rule as the documentation puts it, by brute force over whole steps."""
    area, root = width * height, int(math.sqrt(width * height))
    low = root // 2 // 16 * 16
    sizes = set()
    for w in range(low, root + 16, 16):
        h = area // w // 16 * 16
        sizes |= {(w, h), (h, w)}
    return sorted(sizes)


@given(st.integers(8, 80), st.integers(8, 80), st.integers(40, 2000), st.integers(40, 2000))
def test_buckets_follow_the_rule(w16, h16, clip_width, clip_height):
    resolution = (16 * w16, 16 * h16)
    buckets = Buckets(resolution, enable=True)
    sizes = reference_buckets(*resolution)
    assert list(buckets.sizes) == sizes
    ratios = np.array([w / h for w, h in sizes])
    assert buckets.choose(clip_width, clip_height) == sizes[int(np.abs(ratios - clip_width / clip_height).argmin())]


def test_bucket_switches():
    assert Buckets((832, 480)).choose(100, 900) == (832, 480)
    assert Buckets((832, 480), enable=True).choose(100, 900) == (304, 1312)  # isqrt(area) 631, half 315 -> 304
    small = Buckets((832, 480), enable=True, no_upscale=True)
    assert small.choose(250, 130) == (240, 128)
    assert small.choose(1920, 1080) == Buckets((832, 480), enable=True).choose(1920, 1080)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 60), st.integers(1, 60))
def test_crop_fills_the_bucket_from_the_centre(width, height, w16, h16):
    bucket = (16 * w16, 16 * h16)
    crop = centre_crop(width, height, bucket)
    assert crop.resized[0] >= bucket[0] and crop.resized[1] >= bucket[1]
    assert crop.resized[0] == bucket[0] or crop.resized[1] == bucket[1]
    assert abs(2 * crop.left + bucket[0] - crop.resized[0]) <= 1
    assert abs(2 * crop.top + bucket[1] - crop.resized[1]) <= 1
