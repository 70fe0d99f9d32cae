"""lapwan srpo as a command: killed and resumed, offline, ended early, on two processes, and what it refuses."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Started
from forkserver import PATIENCE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_srpo_objective import PlainReward, settings_for
from training_cases import randomise
from two_processes import two_processes

from lapwan.commands import srpo
from lapwan.commands.table import COMMANDS
from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.settings.srpo import SrpoSettings
from lapwan.tiny.model import tiny_folder
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS
from lapwan.train.checkpoint import checkpoints
from lapwan.train.parallel import Distributed, join_processes
from lapwan.train.recipe import run_training
from lapwan.train.run_folder import claim_run, start_folder
from lapwan.train.srpo import recipe
from lapwan.train.srpo.objective import RewardModels
from lapwan.train.srpo.plan import too_slow

LOW = NoiseExpert.LOW
CPU = torch.device("cpu")


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.json"
    texts = ["剪刀剪断血管", "电凝钩切割组织", "吸引器清理积血", "抓钳夹住胆囊", "a hook cuts", "scissors cut"]
    path.write_text(json.dumps([{"caption": text} for text in texts]), encoding="utf-8")
    return path


def arguments(run: Path, prompts: Path, *more: str) -> list[object]:
    return ["srpo", "--prompts", prompts, "--reward", "tiny", "-o", run, "--size", "32x32", "--device", "cpu",
            "--set", "rollout.steps=2", "--set", "accumulate=2", "--set", "targets.last_blocks=2",
            "--set", "targets.ffn_last_blocks=1", "--set", "held_out.count=2", "--set", "held_out.every=2", *more]


def test_resume_after_kill_9_is_bitwise_the_uninterrupted_run(succeed, tmp_path):
    prompts = prompts_file(tmp_path)
    more = ("--steps", "4", "--save-every", "1", "--lr", "1e-2", "--set", "ema_decay=0.9",
            "--set", "master_weights=bf16", "--set", "kl_weight=0.1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    victim = Started(*arguments(killed, prompts, *more))
    deadline = time.monotonic() + PATIENCE
    while not checkpoints(killed) and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    ended = victim.wait()
    assert ended.code == -signal.SIGKILL, ended
    done = [step for step, _ in checkpoints(killed)]
    assert done and done[-1] < 4, "the process was to die in the middle"
    again = Started(*arguments(killed, prompts, *more, "--resume"))
    succeed(*arguments(whole, prompts, *more))
    ended = again.wait()
    assert ended.code == 0 and f"at step {done[-1]} of 4" in ended.err, ended
    assert ended.out.strip() == str(killed / "lapwan_low_noise.safetensors")
    for name in ("lapwan_low_noise.safetensors", "step_000004/state/trained.safetensors"):
        ours, theirs = load_file(killed / name), load_file(whole / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, killed)]
    for one, other in zip(*rows, strict=True):
        timed = ("seconds", "clips_per_second", "peak_gib")
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    last = rows[0][-1]
    for key in ("reward/positive", "reward/negative", "reward/margin", "kl_proxy", "grad_norm", "held_out/margin",
                "held_out/margin_over_base", "held_out/low/kl_proxy", "weights/low/delta_norm"):
        assert key in last, key
    assert any(key.startswith("reward_by_branch/inversion/0.") for row in rows[0] for key in row)
    shown = sorted(path.name for path in (whole / "previews").iterdir())
    assert shown == [f"step_{step:06d}_{i}.png" for step in (0, 2, 4) for i in (0, 1)]
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 2 and page.count("<img alt=") == 6 and "4 / 4" in page
    state = torch.load(whole / "step_000004" / "state" / "rest.pt", weights_only=True)["optimisers"]["low"]["state"]
    assert {value.dtype for one in state.values() for value in one.values() if isinstance(value, torch.Tensor)} == {
        torch.bfloat16}


def prepared(settings: SrpoSettings, ranks: Distributed | None = None) -> Any:
    planned = srpo.plan(settings, CPU)
    settings.output.mkdir(exist_ok=True)
    rewards = {"tiny": PlainReward()}
    return recipe.prepare(settings, planned.base, planned.data, rewards, planned.memory, CPU, ranks)


def offline_settings(tmp_path: Path, cache: Path, **changes: Any) -> SrpoSettings:
    return settings_for(tmp_path, prompts={"cache": cache}, rollout={"offline": True}, size=None, **changes)


def test_offline_takes_the_caches_latents_and_never_loads_the_other_noise_expert(tmp_path, t2v_cache, capsys):
    settings = offline_settings(tmp_path, t2v_cache, num_frames=5, preference={"frames": 2})
    trainer = prepared(settings)
    assert "loading the high" not in capsys.readouterr().err
    noise_expert, (batch,) = LOW, trainer.objective.prepare(LOW, [trainer.data.load_batch([0])])
    latents = load_file(t2v_cache / "clip0_wan.safetensors")
    [name] = [key for key in latents if key.startswith("latents_") and "image" not in key]
    assert torch.equal(batch.latents_BCTHW[0], latents[name].float())
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    run_training(trainer, settings)
    assert trainer.data.streams[noise_expert].steps == 2
    assert any(not torch.equal(before[name], p) for name, p in trainer.parameters.items())
    one_frame = prepared(offline_settings(tmp_path, t2v_cache, output=tmp_path / "still"))
    assert torch.equal(one_frame.data.load_batch([0]).latents_BCTHW[0], latents[name].float()[:, :1])


def test_a_full_fine_tune_writes_a_transformer_folder_that_loads(tmp_path):
    settings = settings_for(tmp_path, train="full", steps=1, optimizer={"lr": 1e-3}, dtype="bf16",
                            master_weights="bf16", held_out={"count": 1, "every": 1})
    trainer = prepared(settings)
    run_training(trainer, settings)
    from diffusers import WanTransformer3DModel

    found = WanTransformer3DModel.from_pretrained(settings.output / "transformer_2", dtype=torch.bfloat16)
    trained = dict(trainer.objective.trained[LOW].backbone.transformer.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in found.named_parameters())
    row = json.loads((settings.output / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["weights/low/delta_norm"] > 0 and row["held_out/low/kl_proxy"] > 0


def test_the_run_ends_early_when_the_margin_stops_rising(tmp_path):
    settings = settings_for(tmp_path, steps=9, max_grad_norm=1e-30, keep_best=1, save_every=1, keep_last=1,
                            held_out={"count": 1, "every": 1, "patience": 2, "images": 0})
    trainer = prepared(settings)
    run_training(trainer, settings)
    # Steps too small to change anything: the margin of the first look is never beaten.
    assert trainer.finished is not None and "has not risen for 2 evaluations" in trainer.finished
    assert trainer.step < 9 and checkpoints(settings.output)[-1][0] == trainer.step


def test_a_new_lora_belongs_to_its_noise_expert_and_says_how_it_was_made(tmp_path):
    settings = settings_for(tmp_path, noise_experts="both", steps=4, sigma=(0.6, 0.95))
    trainer = prepared(settings)
    assert [e.value for e in trainer.schedule].count("low") == 3, "steps in proportion to each one's part"
    run_training(trainer, settings)
    for noise_expert, band in ((NoiseExpert.HIGH, "875,950"), (LOW, "600,874.999")):
        with safe_open(settings.output / f"lapwan_{noise_expert.file_suffix}.safetensors", "pt") as file:
            told = file.metadata()
        assert told["lapwan.noise_expert"] == noise_expert.value and told["modelspec.timestep_range"] == band
        assert told["lapwan.rewards"] == "tiny" and told["lapwan.step"] == "4"


def test_one_noise_expert_at_a_time_changes_no_bit(tmp_path):
    found = []
    for memory in ("both", "one"):
        settings = settings_for(tmp_path, output=tmp_path / memory, memory=memory, noise_experts="both", steps=3,
                                held_out={"count": 1, "every": 2, "images": 0})
        trainer = prepared(settings)
        run_training(trainer, settings)
        found.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_prompts_may_move_but_not_change(tmp_path):
    settings = settings_for(tmp_path, steps=1)
    start_folder(settings, overwrite=False)
    run_training(prepared(settings), settings)
    moved = (tmp_path / "prompts.txt").rename(tmp_path / "elsewhere.txt")
    plain = {**settings.model_dump(exclude_unset=True), "resume": True, "prompts": {"file": moved}}
    again = SrpoSettings.model_validate(plain)
    claim_run(again, overwrite=False)
    assert prepared(again).resume()
    moved.write_text(moved.read_text(encoding="utf-8") + "a new prompt\n", encoding="utf-8")
    with pytest.raises(UserError, match="different contents of: prompts"):
        prepared(again).resume()
    with pytest.raises(UserError, match=r"cannot resume .* with other settings .reach"):
        claim_run(SrpoSettings.model_validate({**plain, "reach": 0.01}), overwrite=False)


PARTS = {"steps": 2, "optimizer": {"lr": 1e-2}, "held_out": {"count": 1, "every": 1, "images": 1}}


def sharing(folder: Path, name: str, ranks: Distributed) -> Any:
    settings = settings_for(folder, output=folder / name, **PARTS)
    trainer = prepared(settings, ranks)
    randomise(trainer)
    for one in trainer.objective.rollout._backbones.values():
        one.transformer.double()
    trainer.objective.reward_models.decode.vae.double()
    decode = trainer.objective.reward_models.decode
    trainer.objective.reward_models = RewardModels({"tiny": PlainReward()}, {"tiny": 1.0}, decode)
    trainer.fit()
    return trainer


def work(rank: int, folder: Path) -> None:
    ranks, _ = join_processes("cpu")
    sharing(folder, "two", ranks)
    ranks.close()


def test_two_processes_take_the_steps_of_one(tmp_path):
    settings_for(tmp_path)  # writes the prompts
    with two_processes(work, tmp_path):
        sharing(tmp_path, "one", Distributed())
    ours, theirs = (load_file(tmp_path / run / "step_000002" / "state" / "trained.safetensors")
                    for run in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-10, msg=name)
    lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
             for run in ("one", "two")]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for key in ("loss", "reward/margin", "grad_norm", "held_out/margin"):
            assert other[key] == pytest.approx(one[key], abs=1e-6), key


@pytest.mark.parametrize(("changes", "said"), [
    ({"sigma": (0.9, 0.95)}, "lies outside the low noise expert's band [0, 0.875]"),
    ({"sigma": (0.86, 0.95)}, "shorter than reach = 0.0215"),
    ({"size": (40, 32)}, "multiples of 16"), ({"num_frames": 4}, "must be 4N+1"),
    ({"model": "tiny-i2v"}, "num_frames = 1 on an image-to-video model"),
    ({"model": "tiny-i2v", "num_frames": 5}, "needs first frames"),
    ({"held_out": {"count": 4}}, "leaves none to train on"),
    ({"held_out": {"count": 1, "num_frames": 4}}, "held_out: frames = 4: must be 4N+1"),
    ({"held_out": {"count": 1, "size": "50x32"}}, "held_out: size 50x32"),
    ({"rewards": [{"type": "hps", "path": "nowhere.pt"}]}, "nowhere.pt"),
    ({"rewards": [{"type": "clip", "path": "."}]}, "."),
])
def test_what_cannot_be_aligned_is_one_line(tmp_path, changes, said):
    with pytest.raises(UserError) as error:
        srpo.plan(settings_for(tmp_path, **changes), CPU)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "said"), [
    ({"sigma": (0.9, 0.8)}, "bounds must satisfy"), ({"rollout": {"offline": True}}, "set prompts.cache"),
    ({"train": "full", "kl_weight": 1.0}, "a full fine-tune overwrites"),
    ({"master_weights": "bf16", "optimizer": {"type": "automagic"}}, "is only for optimizer.type = 'adamw'"),
    ({"train": "full", "dtype": "fp8"}, "is for a base that stays frozen"),
    ({"prompts": {}}, "give exactly one of prompts.file"),
    ({"held_out": {"count": 0, "patience": 2}}, "needs held-out prompts"),
    ({"noise_experts": "transformer_3"}, "'transformer_3' is not a noise expert; give low"),
    ({"rewards": []}, "no reward"),
    ({"num_frames": 5, "preference": {"frames": 6}}, "preference.frames = 6 is more than num_frames = 5"),
    ({"prompts": {"cache": "c", "negative": "blurred"}}, "prompts.negative is for prompts.file"),
])
def test_settings_that_contradict_themselves(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        settings_for(tmp_path, **changes)


def test_a_file_of_something_else_is_not_taken_for_text_features_and_stays(tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(2)}, lora)
    before = lora.read_bytes()
    settings = settings_for(tmp_path)
    prompts = settings.prompts.model_copy(update={"features": lora})
    with pytest.raises(UserError, match="holds no text features written by lapwan"):
        srpo.plan(settings.model_copy(update={"prompts": prompts}), CPU)
    assert lora.read_bytes() == before


def test_bf16_masters_of_fp32_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="dtype makes them fp32"):
        prepared(settings_for(tmp_path, train="full", master_weights="bf16", dtype="fp32"))


def test_a_model_too_large_for_a_cpu_is_refused_but_planned(tmp_path):
    settings = settings_for(tmp_path, size=(96, 96), num_frames=5, rollout={"steps": 1000}, accumulate=65536)
    planned = srpo.plan(settings, CPU)
    slow = too_slow(settings, planned.base, planned.data, CPU)
    assert slow is not None and slow.startswith("no CUDA device") and "hours on this CPU" in slow
    quick = settings_for(tmp_path)
    assert too_slow(quick, planned.base, srpo.plan(quick, CPU).data, CPU) is None


def test_dry_run_prints_the_memory_of_this_configuration_by_gpu(succeed, tmp_path):
    done = succeed(*arguments(tmp_path / "run", prompts_file(tmp_path), "--dry-run"))
    for text in ("sigma [0.7, 0.875] (sigma = [0.7, 0.95], cut to its band)", "24 to 141 GB  ",
                 "2 Euler steps", "4 prompts, 2 held out", "dry run"):
        assert text in done.err, text
    assert 'type = "tiny"' in done.out and not (tmp_path / "run").exists()


def test_the_plan_counts_what_each_measure_saves(tmp_path):
    from lapwan.memory.srpo import parts_of
    from lapwan.tiny.resolve import resolve_base

    base, cuda = resolve_base("tiny"), torch.bfloat16

    def peak(both: bool = True, checkpointing: bool = False, **changes: Any) -> int:
        settings = settings_for(tmp_path, **changes)
        parts = parts_of(settings, base, (LOW,), base.spec.noise_experts, (1, 64, 64), EMBEDDED_REWARD_KINDS, cuda)
        return parts.peak(both, checkpointing)

    assert peak(both=False) < peak() and peak(checkpointing=True) < peak()
    assert peak(batch_size=2) > peak() and peak(vae_dtype="bfloat16") < peak()
    looks = [peak(held_out={"count": 1, **shown}) for shown in ({}, {"size": (512, 512)}, {"num_frames": 17})]
    assert looks[0] == peak() < looks[2] < looks[1]  # a look may take more than a step
    full = {"train": "full", "dtype": "bf16"}
    numbers = sum(p.numel() for p in base.load(LOW).transformer.parameters())
    assert peak(**full) - peak(**full, master_weights="bf16") == 8 * numbers  # 2 + 12 bytes against 2 + 4
    assert peak(**full) - peak(**full, optimizer_on_cpu=True) == 12 * numbers
    assert peak(**full, ema_decay=0.9) - peak(**full) == 4 * numbers


def test_a_gpu_too_small_is_one_line_with_what_to_change(tmp_path):
    from lapwan.memory.srpo import plan_srpo
    from lapwan.tiny.resolve import resolve_base

    settings, base = settings_for(tmp_path), resolve_base("tiny")
    with pytest.raises(UserError) as error:
        plan_srpo(settings, base, (LOW,), base.spec.noise_experts, (1, 64, 64), EMBEDDED_REWARD_KINDS,
                  torch.device("cuda"), free=2**20)
    assert "lower batch_size (now 1)" in str(error.value) and "\n" not in str(error.value)
    fits = plan_srpo(settings, base, (LOW,), base.spec.noise_experts, (1, 64, 64), EMBEDDED_REWARD_KINDS,
                     torch.device("cuda"), free=2**36)
    assert fits.both and not fits.checkpointing


def test_the_embedded_folder_and_the_command_are_known():
    assert tiny_folder("t2v").is_dir() and "srpo" in [row.name for row in COMMANDS]
