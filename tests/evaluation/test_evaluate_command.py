"""`lapwan evaluate` as it is typed: the JSON that scripts rely on, refusals, what a kill leaves, and what it says."""

from __future__ import annotations

import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from adapter_cases import write_random_lora, write_random_mixture
from cache_cases import write_random_cache
from command_line import Started
from PIL import Image

from lapwan.caching.read import load_index
from lapwan.evaluation.recipe import reward_identity
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.settings.evaluate import EvaluateSettings
from lapwan.settings.load import load
from lapwan.settings.rewards import ClipSettings

SMALL = ("--device", "cpu", "--steps", "2", "--set", "videos.size=[32, 32]", "--set", "videos.num_frames=5",
         "--set", "videos.guidance=1", "--set", "interval.samples=200")


@pytest.fixture
def evaluate(lapwan):
    return partial(lapwan, "evaluate")


def estimate(value: dict) -> None:
    assert value["ci95"] is None or value["ci95"][0] <= value["mean"] <= value["ci95"][1], value


def test_the_json_holds_what_scripts_rely_on(evaluate, tmp_path, held_out, mixture_path, t2v_cache):
    paraphrases = tmp_path / "paraphrases.jsonl"
    lines = [{"caption": "把组织分开", "instrument_label": 0}, {"caption": "烧灼止血", "instrument": "hook"}]
    paraphrases.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    code, out, err = evaluate(
        "--moe", mixture_path, "--clips", held_out, "--cache", t2v_cache, "--split", "all", "-o", "out", *SMALL,
        "--paraphrases", paraphrases, "--set", "loss.bins=2")
    assert code == 0, err
    said = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    names = ["base", "router", "hint", "wrong hint"]
    assert said["adapters"] == names == list(said["loss"]) == list(said["generation"])
    routing = said["routing"]
    assert set(routing) >= {"accuracy", "confusion", "n", "families", "paraphrases", "probe"}
    assert routing["n"] == 4 and sum(map(sum, routing["confusion"])) == 4 and routing["paraphrases"]["n"] == 2
    assert set(routing["probe"]) == {"synthetic", "captions", "paraphrases"} and routing["probe"]["captions"] >= 0.75
    for name in names:
        for noise_expert in ("high", "low"):
            own = said["loss"][name][noise_expert]
            estimate(own)
            assert own["mean"] > 0 and len(own["bins"]) == 2 and set(own["families"]) == {
                "scissors", "hook", "suction", "other"}
            assert own["roi"]["n"] == 2 and own["outside"]["mean"] > 0
        assert set(said["generation"][name]) == {
            "identity", "judged_none", "judged_unclear", "temporal_consistency", "motion"}
        estimate(said["generation"][name]["identity"])
    pairs = {(d["a"], d["b"]) for d in said["differences"]}
    assert len(pairs) == 6 and ("router", "base") in pairs and ("wrong hint", "hint") in pairs
    for difference in said["differences"]:
        estimate(difference)
    gap = {(d["a"], d["b"], d["metric"]): d["mean"] for d in said["differences"]}
    assert gap["hint", "base", "loss/low"] == pytest.approx(
        said["loss"]["hint"]["low"]["mean"] - said["loss"]["base"]["low"]["mean"], abs=1e-9)
    assert gap["wrong hint", "hint", "loss/low"] != 0
    assert "difference to base" in out and "label \\ answer" in out and "evaluation.json" in out
    for picture in ("evaluation.png", "sheet.png", "sheet_base.png", "sheet_wrong_hint.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert min(image.size) > 40, picture
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    # Four clips by four adapters, all embedded and judged; three of them route.
    assert page.count("<article") == 4 and page.count("data-bytes=") == page.count('class="over verdict"') == 16
    assert page.count('class="over mix"') == 12 and "page: out/report.html" in err
    again = load(EvaluateSettings, config=tmp_path / "out" / "settings.toml", environment={})
    assert again.moe == mixture_path and again.videos.guidance == 1
    code, _, err = evaluate("--moe", mixture_path, "--clips", held_out, "-o", "out", *SMALL)
    assert code == 2 and "output exists: out; pass --resume" in err


def test_dry_run_says_the_plan_and_writes_nothing(evaluate, tmp_path, held_out, mixture_path):
    code, out, err = evaluate("--moe", mixture_path, "--clips", held_out, "--seeds", "3", "--dry-run", *SMALL)
    assert code == 0, err
    assert "4 clips x 3 seeds = 12 per adapter" in err and "identity, judged_none, judged_unclear" in err
    assert "page        report.html" in err
    assert "seeds = 3" in out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "nothing to measure"),
    (("--clips", "none.jsonl"), "cannot read none.jsonl"),
    (("--cache", "none"), "no cache folder none"),
    (("--clips", "{clips}", "--split", "dev"), "no clips of split 'dev' (it has: test)"),
    (("--clips", "{clips}", "--moe", "none.safetensors"), "adapter 'router': no such file"),
    (("--clips", "{clips}", "--steps", "0"), "--steps"),
    (("--clips", "{clips}", "--set", 'videos.metrics=["tip"]'), "image-to-video only"),
    (("--clips", "{clips}", "--set", 'videos.metrics=["reward"]'), "no rewards are given"),
    (("--clips", "{clips}", "--set", 'videos.metrics=["taste"]'), "'identity', 'tip'"),
    (("--clips", "{clips}", "--set", "videos.size=[32, 48]", "--set", 'videos.metrics=["identity"]'), "square"),
    (("--clips", "{clips}", "--set", "videos.num_frames=6"), "4N+1"),
    (("--clips", "{clips}", "--set", 'adapters=[{name="a", hint="truth"}]'), "hint acts on a mixture"),
    (("--clips", "{clips}", "--set", 'adapters=[{name="a b"}, {name="a/b"}]'), "adapters[1].name"),
    (("--clips", "{clips}", "--set", 'adapters=[{name="a b"}, {name="a*b"}]'), "two adapters are called"),
    (("--clips", "{clips}", "--set", 'adapters=[{name="a"}, {name="b", model="tiny-i2v"}]'), "different tasks"),
    (("--clips", "{clips}", "--reward", "clip=nowhere"), "nowhere"),
])
def test_bad_input_is_one_line(evaluate, tmp_path, held_out, arguments, message):
    code, _, err = evaluate(*(str(held_out) if word == "{clips}" else word for word in arguments))
    assert code == 2, err
    lines = [line for line in err.strip().splitlines() if not line.startswith("warning")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_another_task_needs_to_be_asked_for(evaluate, tmp_path, held_out, mixture_path):
    adapters = f'adapters=[{{name="base"}}, {{name="moved", moe="{mixture_path}"%s}}]'
    code, _, err = evaluate("--clips", held_out, "--task", "i2v", "--set", adapters % "", "--dry-run", *SMALL)
    assert code == 2 and "was trained for t2v, but the model is i2v" in err
    code, _, err = evaluate("--clips", held_out, "--task", "i2v", "--set", adapters % ", any_base=true", "--dry-run",
                          *SMALL)
    assert code == 0 and "warning: adapter 'moved'" in err and "tip_accuracy" in err and "psnr" in err


def test_killed_and_resumed_it_is_the_uninterrupted_one(lapwan, tmp_path, held_out, tiny_t2v: ModelSpec):
    """kill -9 between two batches; finished ones are not made again."""
    mixture = write_random_mixture(tmp_path / "mixture.safetensors", Base(tiny_t2v))
    loras = write_random_lora(tmp_path)
    adapters = (f'adapters=[{{name="base"}}, {{name="lora", lora={loras}}}, {{name="moe", moe="{mixture}"}}]')

    def arguments(out: str) -> list[object]:
        return ["evaluate", "--clips", held_out, "-o", out, *SMALL, "--steps", "6", "--batch-size", "2",
                "--set", adapters, "--set", "routing.probe=false"]

    def kept() -> list[Path]:
        return sorted((tmp_path / "killed" / "videos").glob("*/[!.]*.json"))  # not those that are being written

    victim = Started(*arguments("killed"))
    deadline = time.monotonic() + 120
    while not kept() and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait().code == -signal.SIGKILL and 0 < len(kept()) < 12
    before = {path: path.stat().st_mtime_ns for path in kept()}
    again = Started(*arguments("killed"), "--resume")
    for ran in (lapwan(*arguments("whole")), again.wait()):
        assert ran.code == 0, ran.err
    full = len(before) - len(before) % 2  # whole batches of two; half a batch is made again
    assert sum(path.stat().st_mtime_ns == time_ for path, time_ in before.items()) >= full
    ours, theirs = (json.loads((tmp_path / out / "evaluation.json").read_text()) for out in ("killed", "whole"))
    assert ours == theirs


@pytest.mark.parametrize(("families", "labelled", "adapters", "message"), [
    (4, False, "", "'clip0' has no label, which the hint of adapter 'hint' (truth) needs; give labels"),
    (6, True, "", "(6 weights) does not fit the 4 families of adapter 'router'"),
    (4, False, 'adapters=[{name="by router", moe="%s"}]', None),
])
def test_labels_that_a_mixture_needs_are_missed_before_the_work(evaluate, tmp_path, tiny_t2v, mixture_path, families,
                                                                labelled, adapters, message):
    cache = write_random_cache(tmp_path / "cache", tiny_t2v, 6, labelled, families=tuple("abcdef"[:families]))
    chosen = ("--set", adapters % mixture_path) if adapters else ("--moe", mixture_path)
    code, _, err = evaluate("--cache", cache, "--split", "all", *chosen, "--dry-run")
    assert code == (0 if message is None else 2), err
    assert message is None or (err.startswith("error: ") and err.count("\n") == 1 and message in err)


def test_a_clip_shorter_than_the_videos_is_no_reference(evaluate, tmp_path, held_out):
    """Text to video needs no clip: hours of work must not end at the sheet. Five frames are there, nine are made."""
    longer = [*SMALL, "--set", "videos.num_frames=9", "--set", "videos.count=2"]
    code, _, err = evaluate("--clips", held_out, "-o", "out", *longer)
    assert code == 0, err
    said = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert set(said["generation"]["base"]) == {
        "identity", "judged_none", "judged_unclear", "temporal_consistency", "motion"} and said["ceiling"] == {}
    for task, metric in (("i2v", "reference"), ("i2v", "tip")):
        code, _, err = evaluate("--clips", held_out, "--task", task, "--set", f'videos.metrics=["{metric}"]', *longer)
        assert code == 2 and err.startswith(f"error: metric '{metric}'")
        assert "5 frames" in err and "9 are generated" in err
    code, _, err = evaluate("--clips", held_out, "--task", "i2v", *longer, "--dry-run")
    assert code == 0 and "metrics     identity, judged_none, judged_unclear, temporal_consistency, motion" in err


def test_scores_of_other_reward_weights_are_not_those_of_a_finished_video(tmp_path):
    for folder, content in (("a", b"1"), ("b", b"22")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
    told = [reward_identity(ClipSettings(path=tmp_path / name, weight=weight))
            for name, weight in (("a", 1.0), ("a", 0.5), ("b", 1.0))]
    assert told[0] == told[1] != told[2]
    (tmp_path / "a" / "model.safetensors").write_bytes(b"333")
    assert reward_identity(ClipSettings(path=tmp_path / "a")) != told[0]


def test_lora_and_moe_on_the_command_line_make_the_comparison(held_out):
    settings = load(EvaluateSettings, environment={}, options={
        "videos.clips": str(held_out), "lora": ["high=a.safetensors"], "moe": "m.safetensors"})
    assert [(a.name, a.hint, bool(a.lora), bool(a.moe)) for a in settings.compared()] == [
        ("base", None, False, False), ("lora", None, True, False), ("router", None, True, True),
        ("hint", "truth", True, True), ("wrong hint", "wrong", True, True)]


def test_the_cache_decides_which_tiny_is_meant(evaluate, tmp_path, t2v_cache):
    assert load_index(t2v_cache).task == "t2v"
    code, _, err = evaluate("--cache", t2v_cache, "--split", "all", "--dry-run")
    assert code == 0 and "(t2v)" in err
    code, _, err = evaluate("--cache", t2v_cache, "--split", "all", "--task", "i2v", "--dry-run")
    assert code == 2 and "was cached for t2v, but the model is i2v" in err
