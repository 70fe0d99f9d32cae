"""Judges that are trained: the network's answers, calibration, the file, train-judge and evaluate --judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run_lapwan, run_successfully
from safetensors.torch import load_file, save_file

from lapwan.checkpoints.container import read_header
from lapwan.data.taxonomy import load_taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.judge_figures import (
    JudgeAnswers,
    answers,
    fit_temperatures,
    identity,
    judge_figures,
    reliability,
)
from lapwan.evaluation.judge_file import JudgeFile, JudgeMetadata, failed_ceiling, read_judge, write_judge
from lapwan.evaluation.judge_masks import boxes_beside, covered, middle_of
from lapwan.evaluation.judge_net import (
    INSTRUMENT,
    NONE,
    UNCLEAR,
    Canvas,
    JudgeNet,
    JudgeReading,
    Temperatures,
    VideoLogits,
)
from lapwan.evaluation.judge_training import DESTRUCTIONS, JudgeClips, JudgeTraining, destroyed_clips, train_judge_net
from lapwan.evaluation.video_judge import VideoJudge, judge_for
from lapwan.tiny.dataset import write_dataset

CPU = torch.device("cpu")
SURGICAL = load_taxonomy("surgical4")


def squares(count: int, seed: int) -> JudgeClips:
    """A red square, a blue one, both or none of them at random positions on noise; its tip is its middle."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(90, 150, (count, 2, 32, 32, 3)).astype(np.uint8)
    families, tips = np.zeros((count, 2), np.float32), np.full((count, 2, 2, 2), np.nan, np.float32)
    for n in range(count):
        halves = rng.permutation(2)
        for k in ((), (0,), (1,), (0, 1))[n % 4]:
            y, x = int(rng.integers(6, 26)), int(rng.integers(6, 10) + 14 * halves[k])
            frames[n, :, y - 5:y + 5, x - 5:x + 5] = ((250, 10, 10), (10, 10, 250))[k]
            families[n, k], tips[n, :, k] = 1, (x / 32, y / 32)
    state = np.where(families.any(axis=1), INSTRUMENT, NONE)[:, None].repeat(2, axis=1)
    return JudgeClips(frames, state, families, tips)


@pytest.fixture(scope="module")
def net() -> JudgeNet:
    return train_judge_net(squares(64, 0), JudgeTraining(steps=90, batch=24, lr=3e-3, made_unclear=0.25), CPU)


def file_of(net: JudgeNet, share: float | None = 0.95, tip="points", **recipe) -> JudgeFile:
    figures = {} if share is None else {"identity_reconstructed": share, "videos_reconstructed": 40}
    metadata = JudgeMetadata(families=["red", "blue"], names=["red", "blue"], taxonomy="colours", canvas=(32, 32),
                             tip=tip, figures=figures, recipe=recipe)
    return JudgeFile(net, metadata, "f")


def test_it_learns_one_two_none_and_unclear(net) -> None:
    clips = squares(40, 1)
    judged = answers(net, clips)
    once = Temperatures()
    assert identity(judged, once).mean() > 0.9
    states = np.array([reading.state for reading in judged.readings(once)])
    assert (states == clips.states()).mean() > 0.9
    two = [reading for reading, families in zip(judged.readings(once), clips.families_NK, strict=True) if all(families)]
    assert np.mean([reading.seen == (0, 1) for reading in two]) > 0.8
    shown = clips.part(np.flatnonzero(clips.states() == INSTRUMENT))
    broken = answers(net, destroyed_clips(shown, 2, DESTRUCTIONS[1:]))
    assert np.mean([reading.state == UNCLEAR for reading in broken.readings(once)]) > 0.8
    figures = judge_figures({"source": judged}, judged, once, ("red", "blue"))
    assert figures["identity_source"] > 0.9 and figures["tip_accuracy_source"] > 0.6
    assert figures["none_recall"] > 0.8 and figures["videos_none"] == 10
    json.dumps(figures)


def test_equal_seeds_train_equal_judges() -> None:
    a, b = (train_judge_net(squares(8, 0), JudgeTraining(steps=2, batch=8), CPU) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def reading_of(state, families) -> JudgeReading:
    return JudgeReading(np.array(state), np.array(families), np.zeros((1, len(families), 2)), np.zeros((1, 2)))


@pytest.mark.parametrize(("state", "families", "seen", "shows"), [
    ((0.9, 0.05, 0.05), (0.9, 0.2, 0.1), (0,), {(0,): True, (1,): False, (0, 1): False}),
    ((0.9, 0.05, 0.05), (0.9, 0.8, 0.1), (0, 1), {(0,): True, (0, 1): True, (0, 2): False}),
    ((0.9, 0.05, 0.05), (0.3, 0.2, 0.1), (0,), {(0,): True, (0, 1): False}),
    ((0.1, 0.8, 0.1), (0.9, 0.2, 0.1), (), {(0,): False}),
    ((0.1, 0.1, 0.8), (0.9, 0.2, 0.1), (), {(0,): False}),
])
def test_verdicts(state, families, seen, shows) -> None:
    reading = reading_of(state, families)
    assert reading.seen == seen
    assert {named: reading.shows(named) for named in shows} == shows
    assert reading.confidence == pytest.approx(max(state) * (max(families) if seen else 1))


def test_calibration() -> None:
    """Logits that are five times too sure are divided by about five; the curve counts by bin."""
    rng, videos, state = np.random.default_rng(0), [], []
    for _ in range(600):
        logits = rng.normal(size=3)
        state.append(int(rng.choice(3, p=np.exp(logits) / np.exp(logits).sum())))
        videos.append(VideoLogits(5 * logits, np.zeros(2), np.zeros((1, 2, 2)), np.zeros((1, 2))))
    clips = JudgeClips(np.zeros((600, 1, 32, 32, 3), np.uint8), np.array(state)[:, None], np.ones((600, 2), np.float32),
                       np.full((600, 1, 2, 2), np.nan, np.float32))
    assert 4 < fit_temperatures(JudgeAnswers(videos, clips)).state < 6.5
    curve = reliability(np.array([0.95, 0.95, 0.95, 0.95, 0.55]), np.array([True, True, True, False, True]))
    assert curve.ece == pytest.approx(0.8 * 0.2 + 0.2 * 0.45)
    assert [(round(c, 2), r, n) for c, r, n in curve.bins] == [(0.55, 1.0, 1), (0.95, 0.75, 4)]


def test_a_canvas_keeps_the_shape_and_its_points() -> None:
    canvas, frames = Canvas(32, 64), np.full((1, 40, 40, 3), 250, np.uint8)
    put = canvas.put(frames)
    assert put.shape == (1, 32, 64, 3) and (put[:, :, 16:48] == 250).all() and (put[:, :, :16] == 127).all()
    points = np.array([[0.0, 0.5], [1.0, 1.0]])
    assert canvas.to_canvas(points, 40, 40).tolist() == [[0.25, 0.5], [0.75, 1.0]]
    assert np.allclose(canvas.from_canvas(canvas.to_canvas(points, 40, 40), 40, 40), points)


def test_pictures_without_an_instrument_are_made_by_covering_and_cutting() -> None:
    rng, frames = np.random.default_rng(0), np.full((2, 48, 48, 3), 100, np.uint8)
    region = np.zeros((2, 48, 48), np.float32)
    region[:, 20:30, 4:12], frames[:, 20:30, 4:12] = 1, 255
    made = covered(frames, region, rng)
    assert made is not None and (made[0] == 100).all() and (made[1] == frames).all()
    beside = boxes_beside(frames, region, Canvas(32, 32), rng)
    assert beside is not None and beside.shape == (2, 32, 32, 3) and (beside == 100).all()
    assert covered(frames, np.ones_like(region), rng) is None
    assert boxes_beside(frames, np.ones_like(region), Canvas(32, 32), rng) is None
    assert middle_of(region)[0] == pytest.approx([8 / 48, 25 / 48])


def test_a_file_is_read_as_it_was_written_and_damage_is_named(net, tmp_path) -> None:
    path = tmp_path / "judge.safetensors"
    metadata = replace_figures(file_of(net).metadata, {"identity_reconstructed": 0.95, "ece": float("nan")})
    write_judge(path, net, metadata)
    read = read_judge(path)
    assert read.metadata.figures == {"identity_reconstructed": 0.95, "ece": None} and read.canvas == Canvas(32, 32)
    assert torch.equal(read.net.state_dict()["answer.2.bias"], net.state_dict()["answer.2.bias"].bfloat16().float())
    header, tensors = read_header(path).metadata, load_file(path)

    def refused(name: str, header: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / name, header)
        with pytest.raises(UserError) as refusal:
            read_judge(tmp_path / name)
        return str(refusal.value)

    assert "is not a judge; make one with lapwan train-judge" in refused("a", {}, tensors)
    assert "format judge/2; this version reads judge/1: update" in refused("b", {**header, "lapwan.format": "judge/2"},
                                                                           tensors)
    bias = {**tensors, "answer.2.bias": torch.zeros(3)}
    assert "'answer.2.bias' is missing or has another shape than [5]" in refused("c", header, bias)
    nan = {**tensors, "answer.2.bias": torch.full((5,), float("nan"))}
    assert "not finite" in refused("d", header, nan)
    other = {**header, "lapwan.judge": header["lapwan.judge"].replace("[32, 32]", "[33, 32]")}
    assert "canvas" in refused("e", other, tensors)
    with pytest.raises(UserError, match="no such file"):
        read_judge(tmp_path / "nowhere")


def replace_figures(metadata: JudgeMetadata, figures: dict[str, float]) -> JudgeMetadata:
    return metadata.model_copy(update={"figures": figures})


def test_a_judge_below_its_ceiling_or_of_other_families_is_refused(net) -> None:
    assert failed_ceiling(file_of(net, 0.9).metadata, 0.9) is None
    with pytest.raises(UserError, match=r"j must not judge: it names .* 85 % of 40 .* 90 % are needed.*judge_ceiling"):
        judge_for(file_of(net, 0.85), "j", SURGICAL, 0.9, 16)
    with pytest.raises(UserError, match=r"no figure of the VAE's reconstructions"):
        judge_for(file_of(net, None), "j", SURGICAL, 0.9, 16)
    with pytest.raises(UserError, match=r"j names red, blue of taxonomy colours, but the clips .* scissors, hook"):
        judge_for(file_of(net), "j", SURGICAL, 0.9, 16)


def test_verdicts_of_videos_by_their_clips_labels(net) -> None:
    """Families in another order than the judge's; frames of any shape; tips by points."""
    judge = VideoJudge(file_of(net, clips_by_family={"red": 3, "blue": 0}), ("blue", "red"))
    clips = squares(12, 5)
    red = int(np.flatnonzero((clips.families_NK == [1, 0]).all(axis=1))[0])
    frames = clips.frames_NTHWC[red]
    tips = clips.tips_NTK2[red, :, 0]
    clip = EvaluationClip("a", "b", (0.0, 1.0), tips_T2=tips)
    assert judge.refuses(clip) is None
    assert "of which the judge saw no clip" in str(judge.refuses(replace(clip, weights=(0.5, 0.5))))
    assert "has no label" in str(judge.refuses(replace(clip, fallback=True)))
    assert judge.score("identity", frames, clip) == {"identity": 1.0, "judged_none": 0.0, "judged_unclear": 0.0}
    assert judge.score("identity", frames, replace(clip, weights=(1.0, 0.0)))["identity"] == 0.0
    wide = np.full((2, 32, 48, 3), 127, np.uint8)
    wide[:, :, 8:40] = frames
    shifted = (tips * [32, 32] + [8, 0]) / [48, 32]
    for seen, points in ((frames, tips), (wide, shifted)):
        found = judge.score("tip", seen, replace(clip, tips_T2=points))
        assert set(found) == {"tip_accuracy", "tip_confidence"} and 0 <= found["tip_confidence"] <= 1
        assert judge.read(seen).tips_TK2[0, 0] == pytest.approx(points[0], abs=0.15)
    shape = VideoShape(2, (32, 32), 16)
    assert judge.refuses_tip(clip, shape) is None
    assert "has no tip" in str(judge.refuses_tip(replace(clip, tips_T2=None), shape))
    assert "has no boxes" in str(VideoJudge(file_of(net, tip="boxes")).refuses_tip(clip, shape))
    assert "knows no tips" in str(VideoJudge(file_of(net, tip="none")).refuses_tip(clip, shape))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A folder with a cache of labelled scenes and a judge of it, hardly trained."""
    folder = tmp_path_factory.mktemp("judge")
    write_dataset(folder, 12, 5, size=(32, 32), frames=5)
    run_successfully("label", "clips.jsonl", "-o", "labels.jsonl", cwd=folder)
    run_successfully("cache", "--dataset", "labels.jsonl", "--model", "tiny-t2v", "-o", "cache", "--size", "32x32",
                     "--num-frames", "5", cwd=folder)
    run_successfully("train-judge", "--cache", "cache", "-o", "judge.safetensors", "--steps", "2", "--set",
                     "batch_size=8", "--set", "frames=3", cwd=folder)
    return folder


def test_a_judge_from_a_cache_and_what_its_file_says(scenes) -> None:
    metadata = read_judge(scenes / "judge.safetensors").metadata
    assert metadata.families == list(SURGICAL.keys) and metadata.taxonomy_fingerprint == SURGICAL.fingerprint
    assert metadata.canvas == (32, 32) and metadata.tip == "boxes"
    assert metadata.recipe["clips"]["train"] > metadata.recipe["clips"]["test"] > 0
    assert metadata.recipe["with_sources"] == metadata.recipe["clips"]["train"]
    figures = metadata.figures
    assert {"identity_reconstructed", "identity_source", "ece", "reliability", "none_recall", "unclear_precision",
            "false_positives_none"} <= set(figures)
    assert figures["videos_none"] > 0 and figures["videos_unclear"] > 0


@pytest.mark.parametrize(("arguments", "message"), [
    (("--cache", "nowhere", "-o", "x.safetensors"), "no cache folder nowhere"),
    (("--cache", "cache", "-o", "x.bin"), "must end in .safetensors"),
    (("--cache", "cache", "-o", "judge.safetensors"), "output exists"),
    (("--cache", "cache", "-o", "x.safetensors", "--size", "40x64"), "multiples of 16"),
    (("--cache", "cache", "-o", "x.safetensors", "--group", "("), "not a regular expression"),
    (("--cache", "cache", "-o", "x.safetensors", "--group", "case_(.)"), "does not match the clip"),
    (("--cache", "cache", "-o", "x.safetensors", "--group", "scene"), "clips of 1 source videos"),
    (("--cache", "cache", "-o", "x.safetensors", "--set", "taxonomy=cholec6"), "cholec6"),
])
def test_what_cannot_be_trained_on_is_one_line(scenes, arguments, message) -> None:
    refused = run_lapwan("train-judge", *arguments, cwd=scenes)
    assert refused.code == 2 and message in " ".join(refused.err.split()), refused.err


def test_evaluate_refuses_it_until_it_is_accepted(scenes) -> None:
    arguments = ("evaluate", "--model", "tiny-t2v", "--clips", "labels.jsonl", "--count", "2", "--steps", "1", "-o",
                 "out", "--split", "all", "--set", "videos.guidance=1", "--set", "videos.num_frames=5", "--set",
                 "videos.size=32x32", "--set", "videos.sheet=0")
    refused = run_lapwan(*arguments, "--judge", "judge.safetensors", cwd=scenes)
    assert refused.code == 2 and "judge.safetensors must not judge" in " ".join(refused.err.split())
    assert "no such file" in run_lapwan(*arguments, "--judge", "none.safetensors", cwd=scenes).err
    run_successfully(*arguments, "--judge", "judge.safetensors", "--set", "judge_ceiling=0", cwd=scenes)
    document = json.loads((scenes / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert document["judge"]["classes"] == [*SURGICAL.keys, "none", "unclear"]
    assert document["judge"]["fingerprint"] == read_judge(scenes / "judge.safetensors").fingerprint
    assert {"identity", "judged_none", "judged_unclear"} <= set(document["generation"]["base"])
    assert {"identity", "judged_none"} <= set(document["ceiling"])
