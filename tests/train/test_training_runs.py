"""The trainer: resume, order, keyed draws, refused settings, non-finite steps, what a run leaves on disk."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from cache_cases import write_random_cache
from safetensors.torch import load_file
from training_cases import backward, randomise

from lapwan.caching.index import write_index
from lapwan.caching.read import load_index
from lapwan.commands import train_lora, train_moe
from lapwan.errors import Interrupted, UserError
from lapwan.lora.formats import open_lora
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train.checkpoint import checkpoints
from lapwan.train.sample_order import SampleOrder
from lapwan.train.schedule import interleave

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


@pytest.mark.parametrize("noise_expert", list(NoiseExpert))
def test_every_trainable_tensor_of_a_plain_lora_gets_its_gradient(make_lora, noise_expert):
    trainer = make_lora()
    randomise(trainer)
    grads = backward(trainer, noise_expert, [0, 1])
    own = {n for n in trainer.parameters if n.startswith(noise_expert.value)}
    assert set(grads) == own
    assert all(float(g.abs().max()) > 0 for g in grads.values())


@pytest.mark.parametrize("kind", ["lora", "moe"])
def test_resume_is_bitwise_the_uninterrupted_run(kind, make_lora, make_moe, tmp_path):
    make = {"lora": make_lora, "moe": make_moe}[kind]
    common = {"steps": 4, "save_every": 3, "accumulate": 2, "schedule": {"name": "cosine", "warmup_steps": 1},
              "optimizer": {"lr": 1e-2}, "caption_dropout": 0.3}
    whole = make(output=tmp_path / "whole", **common)
    whole.config.run_folder.mkdir()
    whole.fit()
    part = make(output=tmp_path / "part", **common)
    part.config.run_folder.mkdir()
    full_schedule = part.schedule
    part.schedule = full_schedule[:5]  # dies at step 5, two steps after its checkpoint at 3
    part.config = replace(part.config, save_every=3)
    part.fit()
    for step, folder in checkpoints(part.config.run_folder):
        if step != 3:
            import shutil
            shutil.rmtree(folder)
    again = make(output=tmp_path / "part", **common)
    assert again.resume() and again.step == 3
    again.fit()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, again.parameters[name]), name
    for file in whole.config.run_folder.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(tmp_path / "part" / file.name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    rows = [json.loads(line)["step"] for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 9))  # what lay after the resumed step was cut off


def test_the_newest_adapter_files_are_links_to_the_last_checkpoint(make_lora):
    trainer = make_lora(steps=2, save_every=1, keep_last=2)
    run = trainer.config.run_folder
    run.mkdir()
    trainer.fit()
    assert [step for step, _ in checkpoints(run)] == [3, 4]
    for noise_expert in NoiseExpert:
        name = f"lapwan_{noise_expert.file_suffix}.safetensors"
        assert (run / name).stat().st_ino == (run / "step_000004" / name).stat().st_ino
        [(said, file)] = open_lora(run / name).items()
        assert said is noise_expert and file.noise_expert_source == "metadata"
        assert file.metadata["lapwan.step"] == "4" and file.metadata["lapwan.task"] == "t2v"
        assert len(file.metadata["lapwan.base_fingerprint"]) == 64
        said = file.metadata
        assert (said["lapwan.clips"], said["lapwan.items"], said["ss_steps"], said["ss_seed"]) == ("4", "4", "4", "42")
        ranks = [entry.rank for entry in file.read().entries.values()]
        assert json.loads(said["lapwan.ranks"]) == {str(r): ranks.count(r) for r in set(ranks)}
        assert json.loads(said["lapwan.alphas"]) == json.loads(said["lapwan.ranks"])  # alpha = rank where none is said
        assert (said["ss_optimizer"], said["ss_learning_rate"], said["ss_max_train_steps"]) == ("adamw", "0.0001", "2")
        assert said["ss_network_dim"] == str(max(set(ranks), key=ranks.count)) and len(said["lapwan.settings"]) == 64


def test_a_non_finite_gradient_drops_the_step_and_many_in_a_row_stop_the_run_with_its_state(make_lora):
    trainer = make_lora(steps=10, optimizer={"lr": 1e-2})
    trainer.config.run_folder.mkdir()
    for backbone in trainer.objective.backbones.values():
        backbone.transformer.proj_out.register_forward_hook(
            lambda module, inputs, out: out if trainer.step < 2 else out * 1e30)
    with pytest.raises(UserError, match=r"5 steps in a row had a non-finite loss or gradient.*saved at step 7"):
        trainer.fit()
    assert trainer.dropped.count == 5
    assert all(bool(torch.isfinite(p).all()) for p in trainer.parameters.values())
    assert checkpoints(trainer.config.run_folder)[-1][0] == 7


def test_ctrl_c_saves_and_says_how_to_go_on(make_lora):
    import signal

    trainer = make_lora(steps=10)
    trainer.config.run_folder.mkdir()

    def press(module, inputs):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    for backbone in trainer.objective.backbones.values():
        backbone.transformer.proj_out.register_forward_pre_hook(press)
    with pytest.raises(Interrupted, match=r"state saved at step 4 of 20 .*--resume"):
        trainer.fit()
    assert checkpoints(trainer.config.run_folder)[-1][0] == 4


def test_changed_settings_at_resume_are_named_and_refused(tmp_path, t2v_cache):
    def settings(**changes):
        return TrainLoraSettings.model_validate({
            "model": "tiny", "output": tmp_path / "run", "data": {"cache": t2v_cache}, "steps": 1,
            "targets": {"last_blocks": 1, "ffn_last_blocks": 1}, **changes})

    train_lora.run(settings(), RunOptions())
    with pytest.raises(UserError, match="holds a run; pass --resume to continue it, or --overwrite"):
        train_lora.run(settings(), RunOptions())
    with pytest.raises(UserError, match=r"cannot resume .*seed: 42 -> 43"):
        train_lora.run(settings(resume=True, seed=43), RunOptions())
    train_lora.run(settings(resume=True, log_every=5), RunOptions())  # complete: nothing to do, no error
    folder = checkpoints(tmp_path / "run")[-1][1]
    (folder / "state" / "rest.pt").unlink()
    adapter = (tmp_path / "run" / "lapwan_high_noise.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"cannot resume .*has no state/rest.pt.*--overwrite"):
        train_lora.run(settings(resume=True), RunOptions())
    assert (tmp_path / "run" / "lapwan_high_noise.safetensors").read_bytes() == adapter
    (tmp_path / "run" / "mine.txt").write_text("keep")
    train_lora.run(settings(seed=43), RunOptions(overwrite=True))
    assert (tmp_path / "run" / "mine.txt").exists()  # --overwrite removes what a run wrote, nothing else


def test_overrides_reach_one_noise_expert_only(make_lora):
    trainer = make_lora(steps=6, turn=2, low={"steps": 3, "optimizer": {"lr": 5e-5}, "targets": {"q": 2}})
    assert len(trainer.schedule) == 9 and trainer.schedule.count(LOW) == 3
    assert trainer.optimizers["high"].optimizer.param_groups[0]["lr"] == 1e-4
    assert trainer.optimizers["low"].optimizer.param_groups[0]["lr"] == 5e-5
    assert trainer.parameters["low.blocks.7.attn1.to_q.down"].shape[0] == 2
    assert trainer.parameters["high.blocks.7.attn1.to_q.down"].shape[0] == 8


def test_one_noise_expert_alone(make_lora):
    trainer = make_lora(noise_experts=["high"])
    assert set(trainer.data.streams) == {HIGH} and all(n.startswith("high.") for n in trainer.parameters)


def test_turns_are_blocks_in_proportion():
    assert interleave({HIGH: 4, LOW: 4}, 2) == [HIGH] * 2 + [LOW] * 2 + [HIGH] * 2 + [LOW] * 2
    order = interleave({HIGH: 100, LOW: 50}, 10)
    assert order.count(HIGH) == 100 and order.count(LOW) == 50
    assert order[-10:].count(LOW) == 10 or order[-20:].count(LOW) >= 10  # both end together
    assert interleave({HIGH: 3, LOW: 0}, 2) == [HIGH] * 3


def test_an_epoch_shows_every_clip_once_and_visits_have_numbers_of_their_own():
    order = SampleOrder(["a"] * 5 + ["b"] * 3, 2, 0, "high")
    batches, position = order.batches((0, 0), order.batches_per_epoch)
    assert position == (1, 0)
    assert sorted(v.item for b in batches for v in b) == list(range(8))
    assert all(len({"ab"[v.item >= 5] for v in b}) == 1 for b in batches)
    more, _ = order.batches((0, 0), 3 * order.batches_per_epoch)
    numbers = [v.number for b in more for v in b]
    assert len(set(numbers)) == len(numbers) == 24
    assert order.batches((0, 3), 4)[0] == order.batches((0, 0), 7)[0][3:]


def test_weights_make_clips_likelier():
    order = SampleOrder(["a"] * 4, 1, 0, "high", weights=[0, 1, 1, 8])
    seen = [v.item for b in order.batches((0, 0), 4000)[0] for v in b]
    assert seen.count(0) == 0 and 0.75 < seen.count(3) / 4000 < 0.85


def test_a_cache_labelled_by_another_taxonomy_is_refused(tmp_path, tiny_t2v):
    cache = write_random_cache(tmp_path / "cache", tiny_t2v)
    settings = TrainMoeSettings.model_validate(
        {"model": "tiny", "output": tmp_path / "run", "data": {"cache": cache}, "steps": 1, "taxonomy": "cholec6"})
    with pytest.raises(UserError, match="has 4 label weights, but taxonomy cholec6 has 6 families"):
        train_moe.run(settings, RunOptions(dry_run=True))
    index = load_index(cache)
    write_index(replace(index, taxonomy="mine"))
    with pytest.raises(UserError, match="was labelled with taxonomy mine, but the settings name surgical4"):
        train_moe.run(settings.model_copy(update={"taxonomy": "surgical4"}), RunOptions(dry_run=True))


@pytest.mark.parametrize("on_bad_clip", ["keep", "skip"])
def test_a_clip_that_spoils_its_steps_is_named_and_can_be_left_out(on_bad_clip, make_lora, capfd, t2v_cache):
    """Its latents overflow in fp32; every noise expert sees it once an epoch of four clips."""
    trainer = make_lora(steps=16, data={"cache": t2v_cache, "split": "train", "on_bad_clip": on_bad_clip})
    trainer.config.run_folder.mkdir()
    load, bad = trainer.data.load_batch, trainer.data.item_ids[2]

    def spoiled(indices):
        batch = load(indices)
        return replace(batch, latents_BCTHW=batch.latents_BCTHW * (1e30 if bad in batch.ids else 1))

    trainer.data.load_batch = spoiled
    with suppress(UserError):
        trainer.fit()
    err = capfd.readouterr().err
    assert err.count(f"non-finite loss of {bad}; update dropped") == trainer.dropped.count
    assert trainer.dropped.bad_clips == [bad]
    last = [line for line in err.splitlines() if "steps dropped" in line]
    assert f"{trainer.dropped.count} of {trainer.step} steps dropped" in last[0] and f"spoiled by {bad}" in last[0]
    assert trainer.dropped.count == 2 if on_bad_clip == "skip" else trainer.dropped.count > 2
    assert (f"{bad} left out from here on" in err) == (on_bad_clip == "skip")
    again = make_lora(steps=16, data={"cache": t2v_cache, "split": "train", "on_bad_clip": on_bad_clip})
    assert again.resume() and again.dropped.state_dict() == trainer.dropped.state_dict()
    visits = [visit.item for stream in again.data.streams.values() for batch in stream.order.batches((0, 0), 40)[0]
              for visit in batch]
    assert (2 in visits) == (on_bad_clip == "keep")
