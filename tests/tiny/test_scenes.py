"""Scenes: repeatable, true to their tips, boxes and captions, and different between instruments."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from lapwan.data.clip_file import read_clips
from lapwan.data.clips import resolve_video
from lapwan.data.labels import CaptionLabeller
from lapwan.data.taxonomy import load_taxonomy
from lapwan.sampling.video import read_video_metadata
from lapwan.tiny import motion as paths
from lapwan.tiny.captions import caption_for
from lapwan.tiny.dataset import plan_dataset, write_dataset
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scene_targets import TARGETS
from lapwan.tiny.scenes import FAMILIES, STYLES, SceneSpec, render, sample_spec

PAIRS = [(instrument, motion) for instrument in INSTRUMENTS for motion in paths.CHARACTERISTIC[instrument]]
SMALL = {"size": (64, 64), "frames": 9}


def _specs(number: int, **fixed: object) -> list[SceneSpec]:
    rng = np.random.default_rng(5)
    return [sample_spec(rng, instrument, motion, **{**SMALL, **fixed})
            for instrument, motion in PAIRS for _ in range(number)]


@pytest.mark.parametrize("style", STYLES)
def test_equal_specs_give_equal_scenes(style: str) -> None:
    for spec in _specs(1, style=style):
        first, second = render(spec), render(replace(spec))
        assert np.array_equal(first.frames_THWC, second.frames_THWC)
        assert np.array_equal(first.tips, second.tips)
        assert first.caption == second.caption
        other = render(replace(spec, seed=spec.seed + 1))
        assert np.abs(other.frames_THWC.astype(int) - first.frames_THWC).mean() > 3


def test_a_random_state_elsewhere_changes_nothing() -> None:
    spec = _specs(1)[0]
    first = render(spec)
    np.random.default_rng(9).uniform(size=100)
    np.random.seed(123)
    assert np.array_equal(render(spec).frames_THWC, first.frames_THWC)


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (128, 80)])
def test_tips_lie_in_their_boxes_and_in_the_view(size: tuple[int, int]) -> None:
    for spec in _specs(4, size=size):
        scene = render(spec)
        assert scene.frames_THWC.shape == (9, *size, 3)
        x, y = scene.tips.T
        x0, y0, x1, y1 = scene.boxes.T
        assert ((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).all()
        assert (scene.boxes >= 0).all() and (scene.boxes <= 1).all()
        # Inside the round view: its radius is about half the shorter side.
        units = (scene.tips - 0.5) * [size[1], size[0]] / (min(size) / 2)
        assert np.hypot(*units.T).max() < 0.95
        # A head is large: at least a fifth of the view's diameter, unless the view's edge cuts it.
        longer = np.maximum((x1 - x0) * size[1], (y1 - y0) * size[0]) / min(size)
        assert np.median(longer) > 0.2


def points_at_edge(points: np.ndarray, outwards: np.ndarray) -> np.ndarray:
    """The middle of those points that lie farthest to the side where the shaft comes in."""
    out = points @ outwards
    return points[out > np.quantile(out, 0.9)].mean(axis=0)


@pytest.mark.parametrize(("instrument", "motion"), PAIRS)
def test_the_tip_is_where_the_picture_shows_it(instrument: str, motion: str) -> None:
    rng = np.random.default_rng(8)
    for side in paths.SIDES:
        spec = sample_spec(rng, instrument, motion, side=side, size=(128, 128), frames=5)
        scene, without = render(spec), render(spec, with_instrument=False)
        assert np.array_equal(scene.tips, without.tips)
        # Only what the instrument made brighter or of another hue: its shadow scales all channels alike.
        a, b = scene.frames_THWC.astype(float) + 8, without.frames_THWC.astype(float) + 8
        ratio = a / b
        changed = (ratio.max(-1) > 1.15) | (ratio.max(-1) - ratio.min(-1) > 0.35)
        ys, xs = np.mgrid[0:128, 0:128] + 0.5
        for index, (tip, mask) in enumerate(zip(scene.tips, changed, strict=True)):
            assert mask.sum() > 150
            # The shaft runs from the entry side to the head: its far end gives the axis, without our own geometry.
            points = np.stack([xs[mask], ys[mask]], axis=1) / 128
            axis = (tip - 0.5) - points_at_edge(points - 0.5, np.array(paths.SIDES[side]))
            axis /= np.hypot(*axis)
            ahead = ((points - tip) @ axis).max()  # of the picture's side
            assert -0.03 < ahead < 0.09, (spec, index, ahead)
            # What moved near the tip lies in the box.
            near = mask & (np.hypot(xs / 128 - tip[0], ys / 128 - tip[1]) < 0.2)
            x0, y0, x1, y1 = scene.boxes[index] * 128
            inside = (xs > x0 - 1) & (xs < x1 + 1) & (ys > y0 - 1) & (ys < y1 + 1)
            assert near.sum() > 20
            assert (near & inside).sum() > 0.9 * near.sum(), (spec, index)


@pytest.mark.parametrize("instrument", ["hook", "suction"])
def test_the_tip_itself_is_drawn(instrument: str) -> None:
    """Hook: its wire ends at the tip. Suction: the middle of the hole is dark."""
    for spec in _specs(3, size=(128, 128)):
        if spec.instrument != instrument:
            continue
        scene, without = render(spec), render(spec, with_instrument=False)
        for index, (x, y) in enumerate(scene.tips * 128):
            now, before = (s.frames_THWC[index, int(y), int(x)].astype(int) for s in (scene, without))
            if instrument == "suction":
                assert now.max() < 60
            elif paths.engaged(str(spec.motion), index / 8) == 0:  # no spark covers it
                assert np.abs(now - before).max() > 25


def test_the_path_is_known_from_start_shaft_and_motion() -> None:
    """Other tissue, target, frame rate and size change no tip: only what first frame and caption tell counts."""
    for spec in _specs(1):
        tips = render(spec).tips
        other = render(replace(spec, target="tissue", style="neutral", size=(96, 96), fps=24.0)).tips
        assert np.allclose(tips, other, atol=1e-6)
        longer = render(replace(spec, frames=17)).tips
        assert np.allclose(tips, longer[::2], atol=1e-6)


def test_start_can_be_chosen() -> None:
    spec = SceneSpec("hook", start=(0.4, 0.55), **SMALL)  # type: ignore[arg-type]
    assert np.allclose(render(spec).tips[0], (0.4, 0.55))


def test_each_motion_moves_as_its_name_says() -> None:
    def way(instrument: str, **fields: object) -> np.ndarray:
        return np.diff(render(SceneSpec(instrument, seed=3, size=(64, 64), frames=17, **fields)).tips, axis=0)  # type: ignore[arg-type]

    for side, (x, y) in paths.SIDES.items():
        inward = way("scissors", side=side, motion="advance").sum(axis=0)
        assert inward @ (-x, -y) > 0.15
        outward = way("grasper", side=side, motion="retract").sum(axis=0)
        assert outward @ (x, y) > 0.1
        strokes = np.sign(way("hook", side=side, motion="pull") @ (x, y))
        assert (np.diff(strokes[strokes != 0]) != 0).sum() >= 3  # in, out, in, out
    named = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for direction, vector in named.items():
        for motion in ("stroke", "lift"):
            assert way("grasper", motion=motion, direction=direction).sum(axis=0) @ vector > 0.15
        assert way("suction", motion="sweep", direction=direction)[:4].sum(axis=0) @ vector > 0.15
    for direction, sign in (("clockwise", 1), ("counterclockwise", -1)):
        steps = way("suction", motion="circle", direction=direction)
        turns = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
        assert (np.sign(turns) == sign).all()  # y points down: positive turns are clockwise
        assert np.hypot(*steps.sum(axis=0)) < 0.03  # back where it began


def test_sizes_show_the_same_scene() -> None:
    for spec in _specs(1, frames=3):
        large = render(replace(spec, size=(128, 128))).frames_THWC.astype(float)
        small = render(spec).frames_THWC.astype(float)
        pooled = large.reshape(3, 64, 2, 64, 2, 3).mean(axis=(2, 4))
        assert np.abs(pooled - small).mean() < 6


def test_the_surgical_view_is_round_and_the_neutral_one_is_not() -> None:
    spec = SceneSpec("grasper", size=(96, 96), frames=2)
    corners = (slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    assert render(spec).frames_THWC[corners].max() == 0
    neutral = render(replace(spec, style="neutral")).frames_THWC
    assert neutral[corners].min() > 60
    # Neutral is pale and grey; tissue is red.
    redness = [float((f[..., 0].astype(int) - f[..., 2])[:, 20:-20, 20:-20].mean()) for f in
               (render(spec).frames_THWC, neutral)]
    assert redness[0] > 50 and abs(redness[1]) < 25


def test_tissue_moves_without_the_instrument() -> None:
    spec = SceneSpec("scissors", target="bag", motion="advance", size=(64, 64), frames=17)
    frames = render(spec, with_instrument=False).frames_THWC.astype(int)
    assert np.abs(frames[8] - frames[0]).mean() > 1.5
    assert np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)).max() < 12  # slowly


def test_instruments_differ_more_between_than_within() -> None:
    """Nearest neighbour on small pictures of the heads, other seeds: a surgeon's glance, much simplified."""
    rng = np.random.default_rng(2)
    heads, names = [], []
    for instrument in INSTRUMENTS:
        for _ in range(10):
            spec = sample_spec(rng, instrument, side="left", size=(96, 96), frames=5)
            scene = render(spec)
            x, y = (scene.tips[1] * 96).round().astype(int)
            padded = np.pad(scene.frames_THWC[1], ((40, 40), (40, 40), (0, 0)), mode="edge").astype(float)
            crop = padded[y + 40 - 16:y + 40 + 16, x + 40 - 32:x + 40 + 8]
            crop = crop.reshape(8, 4, 10, 4, 3).mean(axis=(1, 3))
            heads.append((crop - crop.mean()).ravel())
            names.append(instrument)
    table = np.linalg.norm(np.array(heads)[:, None] - np.array(heads)[None], axis=-1)
    same = np.array(names)[:, None] == np.array(names)[None]
    off = ~np.eye(len(names), dtype=bool)
    for instrument in INSTRUMENTS:
        rows = np.array(names) == instrument
        assert table[rows][:, rows][off[rows][:, rows]].mean() < table[rows][:, ~rows].mean(), instrument
    table[~off] = np.inf
    assert same[np.arange(len(names)), table.argmin(axis=1)].mean() >= 0.85


def test_captions_name_the_family() -> None:
    """The users' label rule gives every caption to its scene's family, alone."""
    taxonomy = load_taxonomy("surgical4")
    resolver = CaptionLabeller(taxonomy)
    rng = np.random.default_rng(1)
    names = [family.name for family in taxonomy.families]
    for instrument, motion in PAIRS:
        for english in (0.0, 1.0):
            for _ in range(60):
                spec = sample_spec(rng, instrument, motion)
                caption = caption_for(spec, rng, english)
                assert caption.isascii() == bool(english)
                label = resolver.label(caption)
                assert not label.fallback, caption
                assert label.weights[names.index(spec.family)] == pytest.approx(1.0), (caption, label)


def test_captions_tell_the_path() -> None:
    """No caption fits two motions or directions of an instrument: with the first frame it determines the path."""
    rng = np.random.default_rng(4)
    for instrument in INSTRUMENTS:
        said: dict[tuple[str, str], set[str]] = {}
        for motion in paths.CHARACTERISTIC[instrument]:
            for direction in paths.MOTIONS[motion]:
                # One target and one side: these are not what tells motions apart.
                spec = SceneSpec(instrument, motion=motion, direction=direction)
                said[motion, direction] = {caption_for(spec, rng, 0.3) for _ in range(300)}
        for first, second in itertools.combinations(said.values(), 2):
            assert not first & second


@pytest.mark.parametrize("style", STYLES)
def test_captions_are_true(style: str) -> None:
    rng = np.random.default_rng(6)
    sides = {"left": ("左侧", "from the left"), "right": ("右侧", "from the right"), "top": ("上方", "from above"),
             "bottom": ("下方", "from below")}
    named_side = named_target = 0
    for spec in _specs(40, style=style):
        caption = caption_for(spec, rng)
        for side, words in sides.items():
            if any(word in caption for word in words):
                assert side == spec.side, (caption, spec)
                named_side += 1
        targets = {"vessel": ("血管", "vessel"), "gallbladder": ("胆囊", "gallbladder"), "bag": ("标本袋", "bag"),
                   "adhesion": ("粘连", "adhesion"), "ligament": ("韧带", "ligament")}
        for target, words in targets.items():
            if any(word in caption for word in words):
                assert target == spec.target, (caption, spec)
                named_target += 1
        for direction, word in (("left", "向左"), ("right", "向右"), ("up", "向上"), ("down", "向下")):
            if word in caption:
                assert direction == spec.direction, (caption, spec)
    assert named_side > 100
    assert named_target > 100 if style == "surgical" else named_target == 0


def test_neutral_captions_name_no_instrument() -> None:
    resolver = CaptionLabeller(load_taxonomy("surgical4"))
    rng = np.random.default_rng(6)
    for spec in _specs(10, style="neutral"):
        caption = caption_for(spec, rng, 0.5)
        assert caption
        assert resolver.label(caption).fallback, caption


def test_captions_vary_and_mix_languages() -> None:
    rng = np.random.default_rng(3)
    captions = [caption_for(sample_spec(rng, instrument), rng) for instrument in INSTRUMENTS for _ in range(250)]
    assert 0.13 < np.mean([c.isascii() for c in captions]) < 0.27
    assert len(set(captions)) > 600
    assert 0.1 < np.mean([c.count("。") + c.count(".") == 2 for c in captions]) < 0.3
    # The shortest of the users' own captions are among them.
    plain = [caption_for(SceneSpec("grasper"), rng, 0.0) for _ in range(400)]
    assert "抓钳抓取标本袋" in plain
    assert "吸引清理术野" in [caption_for(SceneSpec("suction"), rng, 0.0) for _ in range(800)]


@pytest.mark.parametrize(("fields", "said"), [
    ({"instrument": "hok"}, "instrument 'hok'"), ({"side": "north"}, "side 'north'"),
    ({"motion": "fly"}, "motion 'fly'"), ({"motion": "circle", "direction": "left"}, "direction of circle 'left'"),
    ({"target": "spoon"}, "target 'spoon'"),
    ({"style": "comic"}, "style 'comic'"), ({"frames": 0}, "0 frames"), ({"size": (8, 64)}, "8x64"),
])
def test_wrong_specs_are_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SceneSpec(**{"instrument": "hook", **fields})  # type: ignore[arg-type]


def test_every_instrument_can_do_every_motion_on_every_target() -> None:
    targets = sorted(set(itertools.chain(*TARGETS.values())))
    for number, (instrument, motion) in enumerate(itertools.product(INSTRUMENTS, paths.MOTIONS)):
        spec = SceneSpec(instrument, motion=motion, target=targets[number % len(targets)], size=(32, 32), frames=3)
        scene = render(spec)
        assert scene.frames_THWC.std() > 10
        assert caption_for(spec, np.random.default_rng(0))


def test_dataset_is_what_its_lines_say(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data", clips=9, seed=3, size=(64, 48), frames=9, fps=8.0, test_share=0.34)
    assert path == tmp_path / "data" / "clips.jsonl"
    lines = [clip.data for clip in read_clips(path)]
    assert len(lines) == 9
    assert len({Path(line["video_path"]).stem for line in lines}) == 9
    assert {line["split"] for line in lines} == {"train", "test"}
    for line in lines:
        video = resolve_video(line["video_path"], path)
        with av.open(str(video)) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
            assert float(container.streams.video[0].average_rate) == 8.0
        assert frames.shape == (9, 64, 48, 3)
        assert line["duration"] == pytest.approx(9 / 8)
        assert [entry["frame"] for entry in line["roi"]] == list(range(9))
        assert len(line["tip"]) == 9
        assert read_video_metadata(video)["caption"] == line["caption"]
        scene = render(SceneSpec(line["instrument"], line["side"], line["motion"], line["direction"], line["target"],
                                 line["style"], line["seed"], 9, (64, 48), 8.0))
        assert np.abs(frames.astype(float) - scene.frames_THWC).mean() < 6  # the codec's loss, at half the chroma
        assert np.allclose(line["tip"], scene.tips, atol=1e-4)
        assert np.allclose([entry["box"] for entry in line["roi"]], scene.boxes, atol=1e-4)
        assert (line["caption"], FAMILIES[line["instrument"]]) == (scene.caption, scene.family)


def test_dataset_repeats_itself(tmp_path: Path) -> None:
    written = [write_dataset(tmp_path / name, clips=4, seed=1, size=(32, 32), frames=5, workers=workers)
               for name, workers in (("a", 1), ("b", 2))]
    assert written[0].read_bytes() == written[1].read_bytes()
    clips = [sorted(p.parent.glob("clips/*.mp4")) for p in written]
    assert [c.read_bytes() for c in clips[0]] == [c.read_bytes() for c in clips[1]]
    other_path = write_dataset(tmp_path / "c", clips=1, seed=2, size=(32, 32), frames=5)
    other = json.loads(other_path.read_text(encoding="utf-8"))
    assert other["video_path"] not in written[0].read_text()


def test_families_are_balanced_or_weighted() -> None:
    def counts(clips: int, **options: object) -> dict[str, int]:
        specs = [spec for spec, _ in plan_dataset(clips, 0, (64, 64), 5, 16.0, **options)]  # type: ignore[arg-type]
        assert len({spec.seed for spec in specs}) == clips
        return {name: sum(spec.instrument == name for spec in specs) for name in INSTRUMENTS}

    assert set(counts(160).values()) == {40}
    assert sorted(counts(10).values()) == [2, 2, 3, 3]
    weighted = counts(100, weights={"hook": 7, "suction": 3})
    assert weighted == {"scissors": 0, "hook": 70, "suction": 30, "grasper": 0}
    drawn = plan_dataset(160, 0, (64, 64), 5, 16.0, test_share=0.1)
    assert sum(split == "test" for _, split in drawn) == 16
    pairs = [(spec.instrument, spec.motion) for spec, _ in drawn]
    assert all(pairs.count(pair) == 20 for pair in PAIRS)
    with pytest.raises(ValueError, match="spoon"):
        plan_dataset(4, 0, (64, 64), 5, 16.0, weights={"spoon": 1})
