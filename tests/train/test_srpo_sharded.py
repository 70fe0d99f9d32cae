"""A full fine-tune under FSDP2: two processes' gradients, steps and checkpoints are one's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_srpo_objective import PlainReward, settings_for
from two_processes import two_processes

from lapwan.commands import srpo
from lapwan.errors import UserError
from lapwan.models.base import Base
from lapwan.names import NoiseExpert
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.parallel import Distributed, full_tensors, is_sharded, join_processes
from lapwan.train.srpo import recipe

LOW = NoiseExpert.LOW
SETTINGS = {"train": "full", "steps": 2, "optimizer": {"lr": 1e-4}, "activation_checkpointing": True,
            "held_out": {"count": 1, "every": 2, "images": 1}, "max_grad_norm": 1e-3}


@dataclass(frozen=True)
class WideBase(Base):
    """The noise experts in fp64, by diffusers' own forward in either case: sums may differ in their order only."""

    def load(self, noise_expert: NoiseExpert, dtype: Any = None, device: Any = "cpu", *_: Any, **__: Any) -> Any:
        backbone = super().load(noise_expert)
        backbone.transformer.double().to(device)
        backbone.use_diffusers_forward()
        return backbone


def trainer_of(settings: SrpoSettings, ranks: Distributed, device: torch.device) -> Any:
    planned = srpo.plan(settings, torch.device("cpu"))
    base = WideBase(planned.base.spec)
    if ranks.first:
        settings.output.mkdir(exist_ok=True)
    ranks.any(False)
    return recipe.prepare(settings, base, planned.data, {"tiny": PlainReward()}, planned.memory, device, ranks)


class KeepsGradients(Distributed):
    """Holds the gradients of the first step, before they are clipped: by parameter, gathered."""

    gradients: dict[int, torch.Tensor] | None = None

    def clip_gradients(self, parameters: Any, max_norm: float) -> torch.Tensor:
        if self.gradients is None:
            self.gradients = {
                id(p): full_tensors(p.grad).clone().cpu() for p in parameters if p.grad is not None}
        return super().clip_gradients(parameters, max_norm)


def sharing(folder: Path, name: str, ranks: Distributed, device: torch.device) -> None:
    settings = settings_for(folder, output=folder / name, **SETTINGS)
    keeps = KeepsGradients(ranks.rank, ranks.count, ranks.local_rank)
    trainer = trainer_of(settings, keeps, device)
    parted = [n for n, p in trainer.parameters.items() if is_sharded(p)]
    assert bool(parted) == (ranks.count > 1)
    trainer.fit()
    gradients = keeps.gradients or {}
    weights = {n: p.detach().clone() for n, p in full_tensors(dict(trainer.parameters)).items()}
    ranks.any(False)  # the first has written the checkpoint before anybody reads it
    again = trainer_of(settings.model_copy(update={"resume": True}), ranks, device)
    assert again.resume() and again.step == 2
    for key, value in full_tensors(dict(again.parameters)).items():
        assert torch.equal(value.cpu(), weights[key].cpu()), key
    state = full_tensors(again._state())["optimisers"]["low"]["state"]
    kept = full_tensors(torch.load(folder / name / "step_000002" / "state" / "rest.pt", weights_only=True))
    for index, one in kept["optimisers"]["low"]["state"].items():
        assert all(torch.equal(value, state[index][k].cpu()) for k, value in one.items() if k != "step")
    if ranks.first:
        torch.save({n: gradients[id(p)] for n, p in trainer.parameters.items() if id(p) in gradients},
                   folder / f"{name}_gradients.pt")


def work(rank: int, folder: Path, device: str) -> None:
    ranks, own = join_processes(device)
    sharing(folder, "two", ranks, torch.device(own))
    ranks.close()


def compare(folder: Path, device: str) -> None:
    settings_for(folder)  # writes the prompts
    with two_processes(work, folder, device):
        sharing(folder, "one", Distributed(), torch.device(device))
    ours, theirs = (torch.load(folder / f"{name}_gradients.pt") for name in ("one", "two"))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, gradient in ours.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(theirs[name], gradient, rtol=0, atol=1e-9 * scale + 1e-18, msg=name)
    files = [folder / name / "transformer_2" / "diffusion_pytorch_model.safetensors" for name in ("one", "two")]
    one, two = map(load_file, files)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-7, msg=name)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    compare(tmp_path, "cpu")


@pytest.mark.gpu
def test_two_gpus_have_the_gradients_of_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    compare(tmp_path, "cuda")


def test_a_running_mean_in_parts_is_refused(tmp_path):
    settings = settings_for(tmp_path, train="full", ema_decay=0.9)
    planned = srpo.plan(settings, torch.device("cpu"))
    with pytest.raises(UserError, match="ema_decay with a full fine-tune on several processes"):
        recipe.prepare(settings, planned.base, planned.data, {}, planned.memory, torch.device("cpu"), Quiet(0, 2))


class Quiet(Distributed):
    """The first of two processes, the other of which never asks."""

    def any(self, flag: bool) -> bool:
        return flag
