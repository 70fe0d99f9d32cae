"""A folder of synthetic scenes as real MP4 clips with their `clips.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lapwan.console import progress
from lapwan.distributed import worker_pool
from lapwan.files import write_text
from lapwan.sampling.video import FINE_CRF, write_video
from lapwan.temporaries import workers_write_in
from lapwan.tiny import motion as paths
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import Scene, SceneSpec, render, sample_spec

_SOURCE = "synthetic"


def write_dataset(folder: Path, clips: int, seed: int, size: tuple[int, int] = (64, 64), frames: int = 17,
                  fps: float = 16.0, style: str = "surgical", weights: Mapping[str, float] | None = None,
                  test_share: float = 0.1, workers: int = 1) -> Path:
    """Render `clips` scenes into `folder/clips/*.mp4`, describe them in `folder/clips.jsonl` and return its path.

    Every line has `video_path` (relative to the file), `caption`, `duration` (seconds), `source`, `split` (train or
    test, the same share of each instrument), `roi` (a box around the head for every frame, counted at the clip's own
    fps), and of scenes only `instrument`, `motion`, `direction`, `side`, `target`, `style`, `seed` and `tip` ([x, y] in
    0..1 for every frame). Equal arguments give equal files. `clips.jsonl` is written last: if it exists, all clips do.

    Args:
        size: height, width in pixels, both even.
        weights: relative number of clips of each instrument; without it the same number of each.
        test_share: fraction of the clips in the test split, 0..1.
        workers: processes that render; 1: the current one.
    """
    scenes = plan_dataset(clips, seed, size, frames, fps, style, weights, test_share)
    work = [(folder, f"clips/scene_{style}_{seed}_{index:05d}.mp4", spec, split)
            for index, (spec, split) in enumerate(scenes)]
    lines = []
    with ExitStack() as stack:
        bar = stack.enter_context(progress("scenes", clips, "clip"))
        each: Iterator[str]
        if workers > 1:
            workers_write_in(folder / "clips")
            pool = worker_pool(workers)
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            each = pool.map(_write_clip, work)
        else:
            each = map(_write_clip, work)
        for line in each:
            lines.append(line)
            bar.advance()
    path = folder / "clips.jsonl"
    write_text(path, "".join(line + "\n" for line in lines))
    return path


def _write_clip(work: tuple[Path, str, SceneSpec, str]) -> str:
    """Render one clip; its line of `clips.jsonl`."""
    folder, name, spec, split = work
    scene = render(spec)
    note = {"caption": scene.caption, "seed": str(spec.seed)}
    write_video(folder / name, scene.frames_THWC, spec.fps, note, FINE_CRF)
    return json.dumps(_record(name, scene, split), ensure_ascii=False)


def plan_dataset(clips: int, seed: int, size: tuple[int, int], frames: int, fps: float, style: str = "surgical",
         weights: Mapping[str, float] | None = None, test_share: float = 0.1) -> list[tuple[SceneSpec, str]]:
    """The scenes and splits of a data set: instruments by weight, each one's characteristic motions in turn."""
    if clips < 1 or not 0 <= test_share <= 1:
        raise ValueError(f"a data set needs clips >= 1 and 0 <= test_share <= 1, got {clips} and {test_share}")
    drawn: list[tuple[SceneSpec, str]] = []
    for instrument, number in _shares(clips, weights or dict.fromkeys(INSTRUMENTS, 1.0)).items():
        rng = np.random.default_rng([seed, INSTRUMENTS.index(instrument)])
        tests = round(number * test_share)
        chosen = set(rng.choice(number, tests, replace=False).tolist())
        motions = paths.CHARACTERISTIC[instrument]
        for i in range(number):
            spec = sample_spec(rng, instrument, motions[i % len(motions)], size=size, frames=frames, fps=fps,
                               style=style)
            drawn.append((spec, "test" if i in chosen else "train"))
    order = np.random.default_rng([seed, len(INSTRUMENTS)]).permutation(len(drawn))
    return [drawn[i] for i in order]


def _shares(clips: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to the weights that sum to `clips` (largest remainders)."""
    unknown = [name for name in weights if name not in INSTRUMENTS]
    total = sum(weights.values())
    if unknown or not total > 0 or min(weights.values()) < 0:
        raise ValueError(f"weights must be >= 0, not all 0, for {', '.join(INSTRUMENTS)}; got {dict(weights)}")
    exact = {name: clips * weights.get(name, 0.0) / total for name in INSTRUMENTS}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(INSTRUMENTS, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[:clips - sum(counts.values())]:
        counts[name] += 1
    return counts


def _record(name: str, scene: Scene, split: str) -> dict[str, object]:
    spec = scene.spec
    return {
        "video_path": name, "caption": scene.caption, "duration": round(spec.frames / spec.fps, 4), "source": _SOURCE,
        "split": split, "instrument": spec.instrument, "motion": spec.motion, "direction": spec.direction,
        "side": spec.side, "target": spec.target, "style": spec.style, "seed": spec.seed,
        "roi": [{"frame": i, "box": box} for i, box in enumerate(np.round(scene.boxes, 5).tolist())],
        "tip": np.round(scene.tips, 5).tolist(),
    }
