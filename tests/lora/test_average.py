"""`lapwan merge --average`: the mean of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_cases import make_transformer, merge, random_state, shapes

from lapwan.errors import UserError
from lapwan.lora.average import average_weights, saved_loras, saved_steps
from lapwan.lora.formats import read_lora, write_lora
from lapwan.names import NoiseExpert

STEPS = (100, 150, 250, 300)
SIZES = shapes(range(1))


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints of one run: A and B move a little from step to step."""
    for noise_expert in NoiseExpert:
        for index, step in enumerate(STEPS):
            state = random_state(SIZES, rank=3, alpha=1.5, seed=0, metadata={
                "lapwan.noise_expert": noise_expert.value, "lapwan.step": str(step), "lapwan.task": "t2v"})
            moved = random_state(SIZES, rank=3, seed=10 + index)
            for path, entry in state.entries.items():
                entry.up += 0.05 * moved.entries[path].up
            folder = tmp_path / "run" / f"step_{step:06d}"
            (folder / "state").mkdir(parents=True, exist_ok=True)
            write_lora(folder / f"lapwan_{noise_expert.file_suffix}.safetensors", state)
    return tmp_path / "run"


def deltas(run: Path, step: int) -> dict[str, torch.Tensor]:
    (state,) = read_lora(run / f"step_{step:06d}" / "lapwan_high_noise.safetensors").values()
    return {path: entry.delta(torch.float64) for path, entry in state.entries.items()}


@pytest.mark.parametrize(("options", "weights"), [
    ({}, {100: 0.25, 150: 0.25, 250: 0.25, 300: 0.25}),
    ({"last": "2"}, {250: 0.5, 300: 0.5}),
    ({"checkpoints": "100,300"}, {100: 0.5, 300: 0.5}),
])
def test_the_mean_of_what_the_loras_do(tmp_path, run, options, weights, capsys):
    """A shared A: the mean has the checkpoints' rank, so nothing is lost."""
    merge(average=run, output=tmp_path / "mean.safetensors", **options)
    printed = capsys.readouterr()
    assert "the checkpoints' rank keeps 100.0000%" in printed.out and "ΔW exact" in printed.err
    ((noise_expert, state),) = read_lora(tmp_path / "mean_high_noise.safetensors").items()
    assert noise_expert is NoiseExpert.HIGH and (tmp_path / "mean_low_noise.safetensors").is_file()
    assert state.metadata["lapwan.averaged_steps"] == ",".join(map(str, weights))
    assert "lapwan.step" not in state.metadata and state.metadata["lapwan.task"] == "t2v"
    by_step = {step: deltas(run, step) for step in weights}
    for path, entry in state.entries.items():
        want = sum(weight * by_step[step][path] for step, weight in weights.items())
        assert entry.rank == 3
        torch.testing.assert_close(entry.delta(torch.float64), want, rtol=1e-5, atol=1e-6)


def test_post_hoc_ema_is_the_ema_of_steps_between_which_nothing_moves(tmp_path, run):
    decay = 0.99
    (saved, _) = saved_loras(saved_steps(run)).values()
    mean, mass = dict.fromkeys(STEPS, 0.0), 0.0
    for step in range(1, STEPS[-1] + 1):  # an EMA that starts empty, over the checkpoint at or after each step
        current = next(s for s in STEPS if s >= step)
        mean = {s: decay * weight for s, weight in mean.items()}
        mean[current] += 1 - decay
        mass = decay * mass + 1 - decay
    assert average_weights(saved, decay) == pytest.approx([weight / mass for weight in mean.values()])
    last = saved_steps(run, last=2)
    assert average_weights(last, decay) == pytest.approx(
        [mean[250] / (mean[250] + mean[300]), mean[300] / (mean[250] + mean[300])])
    merge(average=run, ema_decay="0.99", multiplier="0.5", output=tmp_path / "ema.safetensors", one_file=True)
    state = read_lora(tmp_path / "ema.safetensors")[NoiseExpert.HIGH]
    by_step = {step: deltas(run, step) for step in STEPS}
    for path, entry in state.entries.items():
        want = 0.5 * sum(mean[step] / mass * by_step[step][path] for step in STEPS)
        torch.testing.assert_close(entry.delta(torch.float64), want, rtol=1e-5, atol=1e-6)


def test_mistakes(tmp_path, run):
    out = tmp_path / "x.safetensors"
    for options, says in (({"checkpoints": "100,200"}, "no checkpoint of step 200; it has: 100, 150"),
                          ({"last": "9"}, "has 4 checkpoints"), ({"last": "2", "checkpoints": "100"}, "not both"),
                          ({"lora": ["a.safetensors"]}, "leave out --lora"), ({"model": "tiny"}, "leave out --model")):
        with pytest.raises(UserError, match=says):
            merge(average=run, output=out, **options)
    with pytest.raises(UserError, match="no checkpoints"):
        merge(average=tmp_path, output=out)
    with pytest.raises(UserError, match="--last applies only with --average"):
        merge(lora=["a.safetensors"], last="2", output=out)
    with pytest.raises(UserError, match=r"writes one \.safetensors file"):
        merge(average=run, output=tmp_path / "folder")
    (run / "step_000300" / "lapwan_low_noise.safetensors").unlink()
    with pytest.raises(UserError, match="step_000300 does not have a LoRA for each"):
        merge(average=run, output=out)
    (tmp_path / "empty" / "step_000001").mkdir(parents=True)
    with pytest.raises(UserError, match="neither LoRAs nor a transformer"):
        merge(average=tmp_path / "empty", output=out)


def test_the_mean_of_a_full_fine_tune(tmp_path, model_folder):
    """Transformer folders, with other shards in one of them; bf16, rounded once."""
    states = {}
    for step, shard in ((10, "1GB"), (20, "20KB"), (40, "1GB")):
        transformer = make_transformer(step).bfloat16()
        transformer.save_pretrained(tmp_path / "run" / f"step_{step:06d}" / "transformer_2", max_shard_size=shard)
        states[step] = transformer.state_dict()
    merge(average=tmp_path / "run", last="2", ema_decay="0.95", output=tmp_path / "mean")
    first = 0.95**20 * (1 - 0.95**10)
    weights = {20: first / (first + 1 - 0.95**20), 40: (1 - 0.95**20) / (first + 1 - 0.95**20)}
    mean = WanTransformer3DModel.from_pretrained(tmp_path / "mean" / "transformer_2", torch_dtype=torch.bfloat16)
    for name, value in mean.state_dict().items():
        want = sum(weight * states[step][name].double() for step, weight in weights.items())
        torch.testing.assert_close(value.double(), want, rtol=2**-8, atol=1e-6)
    assert not (tmp_path / "mean" / "transformer").exists()
    merge(extract=True, model=str(tmp_path / "mean"), base=str(model_folder), output=tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--rank applies only to a LoRA"):
        merge(average=tmp_path / "run", rank="4", output=tmp_path / "no")
    with pytest.raises(UserError, match="give a folder's name"):
        merge(average=tmp_path / "run", output=tmp_path / "no.safetensors")
