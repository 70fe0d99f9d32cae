"""Looking at a run: weights, health, validation, previews, the checklist, what is kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import edited_cache

from lapwan.commands import train_lora
from lapwan.diagnostics.lora_figures import measure, summarise
from lapwan.errors import UserError
from lapwan.lora.formats import open_lora
from lapwan.names import Band, NoiseExpert, bands
from lapwan.sampling.video import read_video_metadata, write_video
from lapwan.settings.callbacks import PreviewSettings
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train.callbacks.build import check_callbacks
from lapwan.train.callbacks.validation import Validation, fixed_draws
from lapwan.train.checklist import _bands, checklist
from lapwan.train.checkpoint import checkpoints
from lapwan.train.metrics import check_tracker
from lapwan.train.recipe import read_data
from lapwan.train.trainer import Trainer

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


def rows(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()]


def fitted(trainer):
    trainer.config.run_folder.mkdir()
    trainer.fit()
    return trainer


@pytest.fixture(scope="session")
def split_cache(tmp_path_factory, t2v_cache):
    """Four clips, the last two held out."""
    return edited_cache(t2v_cache, tmp_path_factory.mktemp("caches") / "split", lambda items: [
        replace(item, split="test" if i >= 2 else "train") for i, item in enumerate(items)])


def test_logged_figures_of_the_weights_are_those_of_the_saved_files(make_lora):
    trainer = fitted(make_lora(steps=4, watch={"every": 4}, optimizer={"lr": 1e-2}, ema_decay=0.9))
    seen = {row["step"]: row for row in rows(trainer) if "weights/high/delta_norm" in row}
    assert set(seen) == {4, 8}
    for noise_expert in NoiseExpert:
        [(_, file)] = open_lora(trainer.config.run_folder / f"lapwan_{noise_expert.file_suffix}.safetensors").items()
        figures = summarise(measure(file.modules))
        for name in ("legacy_mean_abs", "mean_abs_B", "delta_norm", "init_floor"):
            assert seen[8][f"weights/{noise_expert.value}/{name}"] == pytest.approx(getattr(figures, name), rel=1e-6)
    last = seen[8]
    assert last["weights/ratio/delta_norm"] == pytest.approx(
        last["weights/high/delta_norm"] / last["weights/low/delta_norm"])
    assert last["weights/ratio/lr"] == pytest.approx(1.0)
    assert last["weights/high/growth_of_noise"] == pytest.approx(2**0.5 - 1)  # own steps 2 -> 4


def test_rows_carry_losses_by_sigma_throughput_and_memory(make_lora):
    trainer = fitted(make_lora(steps=6, log_every=3, sigma_bins=3, accumulate=2))
    for row in rows(trainer):
        band = bands(0.875)[NoiseExpert(row["noise_expert"])]
        bins = [key for key in row if key.startswith("loss_at_sigma/")]
        assert bins and all(float(key.split("/")[1].split("-")[0]) >= band.low - 1e-9 for key in bins)
        assert row["clips_per_second"] > 0 and 0 < row["peak_gib"] < 64 and row["own_step"] >= 1
    assert [row["step"] for row in rows(trainer)] == [3, 6, 9, 12]


def test_the_ratio_of_the_weights_follows_the_lr_bounds_of_a_motion_run(make_lora, tmp_path):
    """Users' motion block, scaled up for a small model: bounds 4.95 : 1, and its opposite."""
    ratios = {}
    for name, (first, second) in {"motion": ("high", "low"), "inverse": ("low", "high")}.items():
        keys = {f"{first}_noise_lr_bump": 2e-4, f"{first}_noise_min_lr": 2e-4, f"{first}_noise_max_lr": 5e-3,
                f"{second}_noise_lr_bump": 5e-5, f"{second}_noise_min_lr": 5e-5, f"{second}_noise_max_lr": 1e-3}
        trainer = make_lora(**keys, steps=40, turn=5, log_every=80, watch={"every": 80},
                            output=tmp_path / name, health={"preset": "motion", "after": 20})
        last = rows(fitted(trainer))[-1]
        ratios[name] = last["weights/ratio/mean_abs_B"], last["weights/ratio/lr"], last["health/status"]
    assert ratios["motion"][0] > 1.5 and ratios["inverse"][0] < 1 / 1.5
    assert ratios["motion"][0] / ratios["inverse"][0] > 6  # bounds 4.95 : 1 against 1 : 4.95
    assert ratios["motion"][1] > 3.0 and ratios["inverse"][1] < 0.33
    assert ratios["inverse"][2] == 2.0 > ratios["motion"][2]


def test_the_monitor_stops_a_run_whose_low_expert_learns_too_fast_at_the_step_the_rule_says(make_lora):
    trainer = make_lora(steps=40, turn=2, watch={"every": 4}, low={"optimizer": {"lr": 2e-2}}, save_every=1000,
                        health={"preset": "motion", "on_unhealthy": "stop", "after": 6, "patience": 2})
    trainer.config.run_folder.mkdir()
    # Evaluated at 4, 8, 12, ...: at 12 each noise expert has 6 steps, so 12 is the first to judge and 16 the second.
    with pytest.raises(UserError, match=r"2 evaluations in a row: mean\|B\|, high / low: .*saved at step 16 of 80"):
        trainer.fit()
    assert checkpoints(trainer.config.run_folder)[-1][0] == 16 and rows(trainer)[-1]["health/status"] == 2.0
    again = make_lora(steps=40, turn=2, watch={"every": 4}, low={"optimizer": {"lr": 2e-2}}, save_every=1000,
                      health={"preset": "motion", "on_unhealthy": "warn", "after": 6, "patience": 2})
    assert again.resume()
    again.schedule = again.schedule[:20]
    again.fit()
    assert again.step == 20


def test_a_healthy_run_is_not_stopped(make_lora):
    trainer = make_lora(steps=12, turn=2, watch={"every": 4}, low={"optimizer": {"lr": 1e-4}},
                        optimizer={"lr": 4e-4}, health={"preset": "motion", "on_unhealthy": "stop", "after": 4})
    assert fitted(trainer).step == 24


def test_a_mixture_is_watched_by_its_own_rules(make_moe):
    trainer = fitted(make_moe(steps=4, watch={"every": 4}, optimizer={"lr": 1e-2}, router={"top_k": 4},
                              health={"preset": "motion", "after": 2}))
    last = rows(trainer)[-1]
    families = trainer.objective.mixture.families
    assert last["weights/high/mean_abs_B"] > 0 and "health/status" in last and len(families) == 4


def test_validation_is_the_same_at_every_look_until_the_weights_change(make_lora, split_cache):
    make = {"data": {"cache": split_cache}, "validation": {"every": 2, "sigmas": 3}, "optimizer": {"lr": 1e-2},
            "dropout": {"rank": 0.5}, "caption_dropout": 0.5}
    trainer = make_lora(steps=4, **make)
    assert len(trainer.data.item_ids) == 2 and len(trainer.callbacks["validation"]._store.items) == 2
    first = trainer.callbacks["validation"].losses(HIGH)
    assert first == trainer.callbacks["validation"].losses(HIGH)
    assert len([name for name in first if name.startswith("loss_at_sigma_")]) == 3
    callback = trainer.callbacks["validation"]
    rule, key = callback._sigma_rules[HIGH], (0, "validation")
    noises = [fixed_draws(rule, callback._store.batch([clip]), [0.5], key, place).noise_BCTHW
              for clip, place in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(noises[0], other) for other in noises[1:])
    fitted(trainer)
    seen = [row["validation/high/loss"] for row in rows(trainer) if "validation/high/loss" in row]
    assert len(seen) == 4 and seen[0] != first["loss"]
    assert trainer.callbacks["validation"].losses(HIGH)["loss"] == seen[-1]
    row = rows(trainer)[-1]
    assert row["validation/mean"] == pytest.approx((row["validation/high/loss"] + row["validation/low/loss"]) / 2)
    output = trainer.config.run_folder.parent / "other"
    other = make_lora(steps=4, **{**make, "batch_size": 2, "accumulate": 2}, output=output)
    assert other.callbacks["validation"].losses(HIGH) == first  # nothing of how it is trained


def test_a_mixture_validates_its_routing_too(make_moe, split_cache):
    trainer = make_moe(data={"cache": split_cache}, validation={"every": 2, "sigmas": 1})
    usage = trainer.objective.usage_E.clone()
    figures = trainer.callbacks["validation"].on_step(0, None).figures
    assert 0 <= figures["validation/low/metrics/routing_accuracy"] <= 1
    assert torch.equal(usage, trainer.objective.usage_E)  # looking changes nothing


def test_validation_without_held_out_clips_or_on_trained_ones_is_refused(t2v_cache, split_cache):
    base = resolve_base("tiny")
    for cache, more, message in (
        (t2v_cache, {}, "has no clips of split 'test'"),
        (split_cache, {"data": {"cache": split_cache, "split": "test"}}, "data.split = 'test' trains on the clips"),
    ):
        settings = TrainLoraSettings.model_validate({
            "output": "run", "steps": 1, "model": "tiny", "data": {"cache": cache}, "validation": {"every": 1}, **more})
        with pytest.raises(UserError, match=message):
            check_callbacks(settings, base, read_data(settings, base))


class ScriptedValidation(Validation):
    """Its losses are given: of the high noise expert one after the other, of the low one always 1."""

    def __init__(self, trainer: Trainer, losses: list[float]) -> None:
        rules = {e: stream.sigma_rule for e, stream in trainer.data.streams.items()}
        super().__init__(trainer.objective, rules, store=None, every=1, sigmas=1, seed=0)
        self._scripted = iter(losses)

    def losses(self, noise_expert: NoiseExpert) -> dict[str, float]:
        return {"loss": next(self._scripted) if noise_expert is HIGH else 1.0}


def test_checkpoints_kept_are_the_newest_and_the_best(make_lora, split_cache):
    trainer = make_lora(steps=4, data={"cache": split_cache}, save_every=1, keep_last=2, keep_best=1,
                        validation={"every": 1, "sigmas": 1})
    trainer.callbacks["validation"] = ScriptedValidation(trainer, [3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0])
    fitted(trainer)
    assert [step for step, _ in checkpoints(trainer.config.run_folder)] == [2, 7, 8]
    with pytest.raises(ValueError, match="keep_best needs a validation at every checkpoint: save_every = 3"):
        TrainLoraSettings.model_validate({"output": "run", "steps": 1, "data": {"cache": "c"}, "keep_best": 1,
                                          "save_every": 3, "validation": {"every": 2}})


PREVIEW = {"every": 4, "prompts": ["电凝钩切割组织"], "steps": 3, "size": [32, 32], "num_frames": 5, "guidance": 2.0}


@pytest.mark.parametrize("kind", ["lora", "moe"])
def test_previews_go_through_both_noise_experts_and_change_nothing(kind, make_lora, make_moe, tmp_path):
    make = {"lora": make_lora, "moe": make_moe}[kind]
    plain = fitted(make(output=tmp_path / "plain", steps=4, optimizer={"lr": 1e-2}))
    trainer = fitted(make(output=tmp_path / "run", steps=4, optimizer={"lr": 1e-2}, preview=PREVIEW))
    videos = sorted((trainer.config.run_folder / "previews").iterdir())
    assert [video.name for video in videos] == ["step_000004_0.mp4", "step_000008_0.mp4"]
    facts = [json.loads(read_video_metadata(video)["facts"]) for video in videos]
    assert all(fact["steps"]["high"] >= 1 and fact["steps"]["low"] >= 1 for fact in facts)
    assert facts[0]["frames"] != facts[1]["frames"]
    assert all(torch.equal(p, trainer.parameters[n]) for n, p in plain.parameters.items())
    page = trainer.config.run_folder / "report.html"
    assert "4 / 8" in page.read_text(encoding="utf-8") and page.read_text(encoding="utf-8").count("data-bytes=") == 1
    events = next((trainer.config.run_folder / "tensorboard").iterdir()).read_bytes()
    assert b"preview/0" in events and b"validation/mean" not in events


def test_the_page_of_a_run_goes_on_after_a_kill_and_never_ends_it(make_lora, tmp_path, capsys):
    """It is made of the run's files alone: a line that a kill has cut is left out, and what it cannot write is said."""
    trainer = make_lora(output=tmp_path / "run", preview=PREVIEW)
    run, page = trainer.config.run_folder, trainer.callbacks["page"]
    (run / "previews").mkdir(parents=True)
    lines = [{"step": step, "noise_expert": "high", "loss/diffusion": 1 / step, "loss_at_sigma/0.900-0.925": 1.0}
             for step in range(1, 2000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2000, "noi')
    for step in range(4, 100, 4):
        write_video(run / "previews" / f"step_{step:06d}_0.mp4", np.zeros((5, 32, 32, 3), np.uint8), 16)
    page.on_step(4, None)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.count("data-bytes=") == 8 and "step 4<" in text and "step 96<" in text and 'id="reload"' in text
    page.finish(8)
    assert 'id="reload"' not in (run / "report.html").read_text(encoding="utf-8")
    (run / "metrics.jsonl").write_text("{\n{}\n")
    page.on_step(4, None)
    assert "report.html is not written" in capsys.readouterr().err


def test_a_tracker_gets_the_figures_and_knows_a_run_again(make_lora, tmp_path, monkeypatch):
    """Through accelerate, with a package of the tracker's name that writes down what it gets."""
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match=r"pip install 'lapwan\[wandb\]'"):
            check_tracker("wandb")
    (tmp_path / "trackio.py").write_text(
        "import json\nfrom pathlib import Path\nFILE = Path(__file__).with_name('log')\nclass Run:\n"
        "    def __init__(self, **how): self.how = how\n"
        "    def log(self, values, step=None):\n"
        "        with FILE.open('a') as file: print(json.dumps([self.how, step, values]), file=file)\n"
        "    def finish(self): pass\n"
        "def init(**how): return Run(**how)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.delitem(sys.modules, "trackio")
    fitted(make_lora(steps=1, tracker="trackio"))
    again = make_lora(steps=2, tracker="trackio", allow_changed=True)
    again.resume()
    again.fit()
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [step for _, step, _ in logged] == [1, 2, 3, 4]
    assert len({how["name"] for how, _, _ in logged}) == 1 and logged[0][0]["resume"] == "allow"
    assert {"train/loss/high_noise", "train/lr/high_noise"} <= set(logged[0][2])


def test_a_preview_is_what_generate_makes_of_the_saved_files(make_lora):
    from lapwan.sampling.adapters import read_adapters
    from lapwan.sampling.generator import Generator
    from lapwan.settings.lora_argument import LoraArgument
    from lapwan.train.callbacks.previews import preview_requests

    trainer = fitted(make_lora(steps=2, optimizer={"lr": 1e-2}, preview=PREVIEW, ema_decay=0.5))
    base = resolve_base("tiny")
    files = [LoraArgument(path=trainer.config.run_folder / f"lapwan_{e.file_suffix}.safetensors", noise_expert=e.value)
             for e in NoiseExpert]
    settings = TrainLoraSettings.model_validate(
        {"output": "run", "steps": 1, "data": {"cache": "c"}, "preview": PREVIEW}).preview
    [request] = preview_requests(settings, base.spec, (5, 32, 32))
    again = Generator(*read_adapters(base, files, None)).generate(request)
    [video] = (trainer.config.run_folder / "previews").iterdir()
    assert json.loads(read_video_metadata(video)["facts"])["frames"] == again.facts["frames"]


def test_previews_take_last_frames(tiny_i2v, tmp_path):
    from lapwan.train.callbacks.previews import preview_requests

    for name, grey in (("a", 20), ("b", 200)):
        Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / f"{name}.png")
    preview = {"every": 1, "prompts": ["x"], "images": [tmp_path / "a.png"], "last_images": [tmp_path / "b.png"]}
    [request] = preview_requests(PreviewSettings.model_validate(preview), tiny_i2v, (5, 32, 32))
    assert (request.image.getpixel((0, 0))[0], request.last_image.getpixel((0, 0))[0]) == (20, 200)
    with pytest.raises(ValueError, match="1 last_images for 0 images"):
        PreviewSettings.model_validate(preview | {"images": []})


def checked(cache, **changes) -> dict[str, str]:
    settings = TrainLoraSettings.model_validate(
        {"output": "run", "model": "tiny", "data": {"cache": cache}, "steps": 1000, **changes})
    base = resolve_base("tiny")
    return {str(f).split()[2].rstrip(":,"): str(f) for f in checklist(settings, base, read_data(settings, base))}


def test_the_checklist_says_what_it_found(t2v_cache):
    cache = t2v_cache
    found = checked(cache, health={"preset": "motion"}, high={"optimizer": {"lr": 4e-4}})
    assert found["captions"].startswith("check warn captions: 0 of 4 name a motion")
    assert found["frames"].startswith("check ok   frames: 4 of 4 clips read, 0 with non-finite")
    assert "check ok   LR, high / low: 4 (wanted for motion: 3 to 5 (4 advised)" in found["LR"]
    assert ": 2000 (wanted for motion: 1800 to 2200; one run's experience)" in found["steps"]
    spec = resolve_base("tiny").spec
    assert f"boundary {spec.boundary:g}, samples with shift {spec.flow_shift:g}" in found["model"]
    assert "bands: high [0.875, 1], low [0, 0.875]: no overlap" in found["bands"]
    assert "length: 5 frames (0.31 s); below 17 frames" in found["length"]
    assert "warn 2000 steps: saves every 100 (20 checkpoints), never validates, never previews (one" in found["2000"]
    assert "without previews you cannot see" in found["2000"]
    seen = checked(cache, health={"preset": "motion"}, preview=PREVIEW)
    assert seen["2000"].startswith("check ok ") and "previews every 4" in seen["2000"]
    bad = checked(cache, health={"preset": "motion"}, steps=100, save_every=150)
    assert "warn LR, high / low: 1 " in bad["LR"] and "warn steps" in bad["steps"]
    assert "warn 200 steps" in bad["200"] and "save_every = 150 leaves no checkpoint to go back to" in bad["200"]


def test_the_checklist_sees_motion_words_and_still_or_broken_clips(tmp_path, t2v_cache):
    from lapwan.caching.layout import write_latents

    captions = ("电凝钩切割组织", "The grasper retracts the gallbladder.", "A red wall.")
    cache = edited_cache(t2v_cache, tmp_path / "cache", lambda items: [
        replace(i, caption=c) for i, c in zip(items[:3], captions, strict=True)])
    still = torch.randn(16, 1, 4, 4).expand(16, 2, 4, 4).contiguous()
    write_latents(cache / "clip1_wan.safetensors", still, None, (32, 32), 5, {})
    write_latents(cache / "clip2_wan.safetensors", still * float("nan"), None, (32, 32), 5, {})
    found = checked(cache, health={"preset": "motion"})
    assert "captions: 2 of 3 name a motion" in found["captions"] and "'A red wall.'" in found["captions"]
    assert "warn frames: 3 of 3 clips read, 1 with non-finite latents, 1 that do not move" in found["frames"]
    assert "clip2, clip1" in found["frames"]


def test_clips_that_cannot_be_read_are_named_before_the_start(tmp_path, t2v_cache):
    cache = edited_cache(t2v_cache, tmp_path / "cache", lambda items: items)
    for name in ("clip1", "clip3"):
        file = cache / f"{name}_wan.safetensors"
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"2 of the 4 clips that were checked cannot be read: clip1, clip3; "
                                        r".*clip1_wan.safetensors is truncated"):
        checked(cache)


def test_inverted_and_shared_bands_are_seen():
    assert "inverted" in str(_bands({HIGH: Band(0.0, 0.5), LOW: Band(0.5, 1.0)}))
    assert "overlap" in str(_bands({HIGH: Band(0.8, 1.0), LOW: Band(0.0, 0.9)}))


def test_out_of_memory_says_what_to_change_and_saves(make_lora, tmp_path, monkeypatch):
    trainer = make_lora(steps=4, output=tmp_path / "run")
    trainer.config.run_folder.mkdir()
    load = trainer.data.load_batch

    def large(indices):
        if trainer.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return load(indices)

    trainer.data.load_batch = large
    with pytest.raises(UserError, match=r"out of memory in step 4.*20.00 GiB.*the plan was memory: both.*"
                                        r"the state of step 3 is saved.*memory = .stream., act.*--allow-changed"):
        trainer.fit()
    again = make_lora(steps=4, output=tmp_path / "run")
    assert again.resume() and again.step == 3
    again.fit()
    whole = fitted(make_lora(steps=4, output=tmp_path / "whole"))
    assert all(torch.equal(p, again.parameters[n]) for n, p in whole.parameters.items())


def test_a_run_goes_on_in_another_folder_and_with_changed_settings_only_if_allowed(make_lora, t2v_cache, tmp_path):
    from lapwan.settings.base import RunOptions

    def settings(run, **changes):
        return TrainLoraSettings.model_validate({
            "model": "tiny", "output": run, "data": {"cache": t2v_cache}, "steps": 2, "watch": {"every": 1000},
            "targets": {"last_blocks": 1, "ffn_last_blocks": 1}, "optimizer": {"lr": 1e-2}, "device": "cpu", **changes})

    train_lora.run(settings(tmp_path / "run"), RunOptions())
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    with pytest.raises(UserError, match=r"cannot resume .*steps: 2 -> 3.*or pass --allow-changed"):
        train_lora.run(settings(moved, steps=3, resume=True), RunOptions())
    train_lora.run(settings(moved, steps=3, resume=True, allow_changed=True, optimizer={"lr": 5e-3}), RunOptions())
    lines = [json.loads(line) for line in (moved / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == [1e-2] * 4 + [5e-3] * 2
    assert (moved / "settings_until_000004.toml").is_file() and "steps = 3" in (moved / "settings.toml").read_text()
    clips = edited_cache(t2v_cache, tmp_path / "other", lambda items: items[:3])
    with pytest.raises(UserError, match="trained on different contents of: clips"):
        train_lora.run(settings(moved, steps=3, resume=True, data={"cache": clips}, optimizer={"lr": 5e-3},
                                save_every=7), RunOptions())


@pytest.mark.parametrize("kind", ["lora", "moe"])
def test_one_noise_expert_at_a_time_trains_and_looks_the_same(kind, make_lora, make_moe, tmp_path, split_cache):
    make = {"lora": make_lora, "moe": make_moe}[kind]
    common = {"steps": 3, "optimizer": {"lr": 1e-2}, "data": {"cache": split_cache}, "ema_decay": 0.9,
              "validation": {"every": 3, "sigmas": 1}, "preview": {**PREVIEW, "every": 3}}
    runs = [fitted(make(output=tmp_path / memory, memory=memory, **common)) for memory in ("both", "one")]
    assert all(torch.equal(p, runs[1].parameters[n]) for n, p in runs[0].parameters.items())
    both, one = ([row.get("validation/mean") for row in rows(run)] for run in runs)
    assert both == one and both[2] is not None
    # the idle noise expert's weights lie in their host copy, and only they
    offload = runs[1].callbacks["onload"].offload
    offload.activate(HIGH)
    for noise_expert, weights in offload._offloads.items():
        copy = weights._rest
        waits = [tensor.data_ptr() == kept.data_ptr() for tensor, kept in zip(copy._tensors, copy._copies, strict=True)]
        assert all(waits) if noise_expert is LOW else not any(waits)
