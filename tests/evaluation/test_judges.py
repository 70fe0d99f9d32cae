"""The evaluator takes any judge: its classes, refusals and figures are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapter_cases import write_random_mixture

from lapwan.data.taxonomy import load_taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.metrics import Judge, make_scorers, metric_names
from lapwan.evaluation.recipe import make_study, open_store
from lapwan.evaluation.router_accuracy import ProbeCaption, ProbeSet, family_probe, measure_probe
from lapwan.evaluation.study import run_study
from lapwan.evaluation.videos import score
from lapwan.models.base import Base
from lapwan.settings.evaluate import EvaluateSettings
from lapwan.settings.load import load
from lapwan.tiny.evaluators import SceneJudge, load_evaluator

SHAPE, CPU = VideoShape(5, (32, 32), 16), torch.device("cpu")
SCENE = EvaluationClip("scene", "剪刀", instrument="scissors", synthetic=True, tips_T2=np.full((5, 2), 0.5))


class BrightnessJudge:
    """Tells bright videos from dark ones; between the two it does not say."""

    classes = ("dark", "bright", "unclear")
    figures: Mapping[str, tuple[str, ...]] = {"identity": ("identity", "brightness")}

    def __init__(self, fingerprint: str = "") -> None:
        self.fingerprint = fingerprint

    def refuses(self, clip: EvaluationClip) -> str | None:
        return None if clip.instrument in self.classes else f"clip '{clip.id}' has no brightness"

    def refuses_shape(self, shape: VideoShape) -> str | None:
        return "one frame is too few" if shape.frames == 1 else None

    def score(self, metric: str, frames_THWC: np.ndarray, clip: EvaluationClip) -> Mapping[str, float]:
        mean = float(frames_THWC.mean())
        answer = "dark" if mean < 100 else "bright" if mean > 150 else "unclear"
        return {"identity": float("nan") if answer == "unclear" else float(answer == clip.instrument),
                "brightness": mean}


def scorers_of(asked: list[str] | None, clips: list[EvaluationClip], judge: Judge | None, from_image=False,
               shape=SHAPE):
    return make_scorers(asked, clips, from_image, shape, judge, {}, CPU)


def test_a_judge_of_another_kind_gives_its_own_figures() -> None:
    clip = EvaluationClip("a", "b", instrument="bright")
    scorers = scorers_of(None, [clip], BrightnessJudge())
    assert metric_names(scorers) == ("identity", "brightness", "temporal_consistency", "motion")
    for value, identity in ((200, 1.0), (20, 0.0)):
        found = score(np.full((5, 32, 32, 3), value, np.uint8), clip, SHAPE, scorers)
        assert (found["identity"], found["brightness"]) == (identity, value)
    assert np.isnan(score(np.full((5, 32, 32, 3), 128, np.uint8), clip, SHAPE, scorers)["identity"])


@pytest.mark.parametrize(("metric", "judge", "clips", "changes", "message"), [
    ("identity", None, [SCENE], {}, "needs a judge of videos, and none was given"),
    ("tip", None, [SCENE], {"from_image": True}, "needs a judge of videos, and none was given"),
    ("tip", BrightnessJudge(), [SCENE], {"from_image": True}, "does not measure it; it measures identity"),
    ("identity", BrightnessJudge(), [SCENE], {}, "clip 'scene' has no brightness"),
    ("identity", BrightnessJudge(), [replace(SCENE, instrument="dark")], {"shape": replace(SHAPE, frames=1)},
     "one frame is too few"),
    ("identity", SceneJudge(), [SCENE, replace(SCENE, id="film", synthetic=False)], {},
     "clip 'film' is not one of the embedded model's synthetic scenes (source = \"synthetic\", instrument one of "
     "scissors, hook, suction, grasper), which its evaluators are for"),
    ("identity", SceneJudge(), [replace(SCENE, instrument="drill")], {}, "clip 'scene' is not one"),
    ("identity", SceneJudge(), [SCENE], {"shape": replace(SHAPE, size=(32, 48))}, "square frames, not 32x48"),
    ("tip", SceneJudge(), [replace(SCENE, synthetic=False)], {}, "image-to-video only"),
    ("tip", SceneJudge(), [SCENE, replace(SCENE, id="other", tips_T2=None)], {"from_image": True},
     "'other' has no tip"),
    ("tip", SceneJudge(), [SCENE], {"from_image": True, "shape": replace(SHAPE, frames=9)},
     "clip 'scene' has its tip in 5 frames, 9 are generated"),
])
def test_what_cannot_be_judged_is_refused_and_left_out(metric, judge, clips, changes, message) -> None:
    with pytest.raises(UserError) as refusal:
        scorers_of([metric], clips, judge, **changes)
    assert str(refusal.value).startswith(f"metric '{metric}': ") and message in str(refusal.value)
    figure = {"identity": "identity", "tip": "tip_accuracy"}[metric]
    left = scorers_of(None, [replace(clip, video=None) for clip in clips], judge, changes.get("from_image", False),
                      changes.get("shape", SHAPE))
    assert figure not in metric_names(left)


def test_a_study_takes_its_judge_and_probe_from_whoever_prepares_it(held_out, tiny_t2v, tmp_path) -> None:
    """Nothing of the toy is looked for, no weights are loaded, and scores of another judge are not used again."""
    mixture = write_random_mixture(tmp_path / "mixture.safetensors", Base(tiny_t2v))
    settings = load(EvaluateSettings, environment={}, options={
        "videos.clips": str(held_out), "moe": str(mixture), "device": "cpu", "videos.steps": 1, "videos.count": 1,
        "videos.guidance": 1, "videos.num_frames": 5, "videos.size": "32x32"})
    load_evaluator.cache_clear()
    asked = []

    def resolve(model, task):
        asked.append((model, task))
        return Base(tiny_t2v)

    alone = make_study(settings, resolve)
    assert asked == [(None, None)] and alone.probe is None
    assert metric_names(alone.scorers) == ("temporal_consistency", "motion") and not alone.ceiling_scorers
    judged = make_study(settings, resolve, SceneJudge())
    assert metric_names(judged.scorers)[0] == "identity" and load_evaluator.cache_info().misses == 0

    texts = {"scissors": "剪刀剪断组织", "hook": "电凝钩烧灼", "suction": "吸引器吸引", "grasper": "抓钳夹持"}
    captions = [ProbeCaption(text, label, held_out) for held_out in (False, True) for label, text in texts.items()]
    study = make_study(settings, resolve, SceneJudge(), lambda spec: ProbeSet("mine", captions))
    arm, store = study.arms[0], open_store(study, tmp_path / "videos")
    findings = run_study(replace(study, arms=study.arms[:2], ceiling_scorers=()), store)
    assert set(findings.probe) == {"mine", "captions"} and findings.probe["mine"] == 1.0
    key = {"arm": arm, "clip": study.clips[0], "sampling": study.sampling, "index": 0, "names": ("identity",)}
    assert open_store(study, tmp_path / "videos").load(**key) is not None
    other = replace(study, depends_on=make_study(settings, resolve, _fingerprinted(SceneJudge())).depends_on)
    assert open_store(other, tmp_path / "videos").load(**key) is None


def _fingerprinted(judge: SceneJudge) -> SceneJudge:
    judge.fingerprint = "of other weights"
    return judge


def test_a_probe_reads_what_is_linear_in_the_features() -> None:
    """Classes apart by one direction each are read, held out ones too; noise is not."""
    rng = torch.Generator().manual_seed(0)
    labels = ["scissors", "hook", "suction", "grasper"] * 30
    captions = [ProbeCaption(str(i), label, i % 3 == 0) for i, label in enumerate(labels)]
    noise = [torch.randn(3, 16, generator=rng) for _ in captions]
    apart = [rows + 6 * torch.eye(16)[labels.index(label)] for rows, label in zip(noise, labels, strict=True)]
    found = measure_probe(captions, apart)
    assert (found.fitted, found.held_out, found.captions) == (1.0, 1.0, 120)
    assert measure_probe(captions, noise).held_out < 0.5
    taxonomy = load_taxonomy("surgical4")
    answers = family_probe(captions, apart, taxonomy).predict(apart[:4])
    assert [taxonomy.keys[i] for i in answers] == ["scissors", "hook", "suction", "other"]
