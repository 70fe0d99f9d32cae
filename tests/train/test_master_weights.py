"""AdamW over true masters: what is stored is what was asked for, and nothing small is lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lapwan.settings.optimizers import AdamWSettings
from lapwan.train.master_weights import MasterAdamW, rounded

SETTINGS = AdamWSettings(lr=1e-2, weight_decay=0.1)


def gradients(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last):
        parameter.grad = gradients(step, parameter.shape).to(parameter.dtype)
        optimizer.step()


def made(parameter: nn.Parameter, master: str, on_cpu: bool = False) -> MasterAdamW:
    return MasterAdamW([{"params": [parameter], "lr": SETTINGS.lr}], SETTINGS, master, on_cpu, seed=3)


def test_fp32_masters_are_torchs_adamw():
    ours, theirs = (nn.Parameter(gradients(99, (7, 5))) for _ in range(2))
    reference = torch.optim.AdamW([theirs], lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    steps(made(ours, "fp32"), ours, 0, 20)
    steps(reference, theirs, 0, 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_fp32_master_of_a_bf16_weight_is_rounded_once_a_step():
    start = gradients(99, (64,)).bfloat16()
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = made(narrow, "fp32")
    reference = torch.optim.AdamW([wide], lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    for step in range(20):
        narrow.grad = gradients(step, (64,)).bfloat16()
        wide.grad = narrow.grad.float()
        optimizer.step()
        reference.step()
        assert torch.equal(narrow, optimizer.state[narrow]["master"].bfloat16())
    torch.testing.assert_close(optimizer.state[narrow]["master"], wide.detach(), rtol=1e-6, atol=1e-7)


def test_bf16_masters_have_no_other_copy_and_lose_no_small_step():
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [parameter], "lr": 1e-5}], AdamWSettings(lr=1e-5, weight_decay=0.0), "bf16",
                            False, 0)
    for _ in range(200):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    assert len(kept) == 2 and all(t.dtype == torch.bfloat16 for t in [*kept, parameter])
    # 200 steps of 1e-5 below 1, where bf16's spacing is 4e-3: rounding to nearest would not have moved at all.
    assert float(parameter.detach().float().mean()) == pytest.approx(1 - 200 * 1e-5, abs=3e-4)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(200):
        nearest -= 1e-5
    assert float(nearest) == 1.0


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    for value in (1.0 + 1 / 512, -3.14159, 1e-20):
        many = rounded(torch.full((20000,), value), generator).float()
        assert len(many.unique()) == 2 and float(many.mean()) == pytest.approx(value, rel=2e-4)
    exact = torch.tensor([0.0, 1.5, -2.0, 2.0**-100])
    assert torch.equal(rounded(exact, generator).float(), exact)


def test_what_the_model_keeps_in_fp32_stays_so():
    narrow, wide = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    optimizer = MasterAdamW([{"params": [narrow, wide]}], SETTINGS, "bf16", False, 0)
    narrow.grad, wide.grad = torch.ones_like(narrow), torch.ones_like(wide)
    optimizer.step()
    assert optimizer.state[wide]["exp_avg"].dtype == torch.float32
    with pytest.raises(ValueError, match="none of them is bf16"):
        made(nn.Parameter(torch.ones(3)), "bf16")


@pytest.mark.parametrize("master", ["fp32", "bf16"])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_restored_optimizer_goes_on_bit_for_bit(master, on_cpu):
    start = gradients(99, (33,)).bfloat16()
    whole, first = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps(made(whole, master, on_cpu), whole, 0, 10)
    optimizer = made(first, master, on_cpu)
    steps(optimizer, first, 0, 4)
    second = nn.Parameter(first.detach().clone())
    again = made(second, master, on_cpu)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[second]["exp_avg"].dtype == (torch.float32 if master == "fp32" else torch.bfloat16)
    steps(again, second, 4, 10)
    assert torch.equal(second, whole)
