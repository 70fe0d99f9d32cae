"""The stacked layer against the formula written out in fp64, group by group and sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lapwan.errors import UserError
from lapwan.lora.attach import Group, attach, initial_state
from lapwan.lora.layer import GateHolder, LayerGroup, StackedLoraLinear
from lapwan.lora.state import AdapterState, LowRank
from lapwan.lora.targets import TargetRule, resolve_targets

RANKS = (3, 1, 5)


@pytest.fixture
def parts() -> tuple[nn.Linear, list[LayerGroup]]:
    torch.manual_seed(0)
    base = nn.Linear(7, 6).double()
    groups = [
        LayerGroup(column, torch.randn(r, 7).double(), torch.randn(6, r).double(), 1.5 + column, trainable=column > 0)
        for column, r in enumerate(RANKS)
    ]
    return base, groups


def formula(base: nn.Linear, groups: list[LayerGroup], x: torch.Tensor, gates_BG: torch.Tensor) -> torch.Tensor:
    """y_b = W x_b + bias + Σ_g gate_bg · alpha_g / r_g · B_g A_g x_b, one sample and one group at a time."""
    rows = []
    for b in range(x.shape[0]):
        y = x[b] @ base.weight.T + base.bias
        for g in groups:
            y = y + gates_BG[b, g.column] * g.alpha / g.down_RI.shape[0] * x[b] @ (g.up_OR @ g.down_RI).T
        rows.append(y)
    return torch.stack(rows)


def test_equals_the_formula_in_output_and_gradients(parts):
    base, groups = parts
    holder = GateHolder(required=True)
    layer = StackedLoraLinear(base, groups, holder).double()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    gates = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    with holder.scope(gates):
        y = layer(x)
        y.square().sum().backward()
    mirror = gates.detach().clone().requires_grad_()
    ours = [t.detach().clone().requires_grad_() for g in groups[1:] for t in (g.down_RI, g.up_OR)]
    rebuilt = [groups[0]] + [LayerGroup(g.column, d, u, g.alpha, True)
                             for g, d, u in zip(groups[1:], ours[::2], ours[1::2], strict=True)]
    want = formula(base, rebuilt, x, mirror)
    want.square().sum().backward()
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(gates.grad, mirror.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.down_RI.grad, torch.cat([t.grad for t in ours[::2]]), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.up_OR.grad, torch.cat([t.grad for t in ours[1::2]], 1), rtol=0, atol=1e-10)


def test_a_batch_of_two_with_different_gates_is_two_batches_of_one_even_when_tokens_equal_batch(parts):
    base, groups = parts
    holder = GateHolder(required=True)
    layer = StackedLoraLinear(base, groups, holder).double()
    x, gates = torch.randn(2, 2, 7, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    with holder.scope(gates):
        together = layer(x)
    for b in range(2):
        with holder.scope(gates[b : b + 1]):
            torch.testing.assert_close(layer(x[b : b + 1]), together[b : b + 1], rtol=0, atol=1e-12)


def test_recomputation_in_the_backward_meets_the_same_gates(parts):
    base, groups = parts
    holder = GateHolder(required=True)
    layer = StackedLoraLinear(base, groups, holder).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    grads = []
    for recompute in (False, True):
        gates = torch.full((2, 3), 0.7, dtype=torch.float64, requires_grad=True)
        layer.zero_grad()
        with holder.scope(gates):
            y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            y.square().sum().backward()
        grads.append([gates.grad, layer.down_RI.grad.clone(), layer.up_OR.grad.clone()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-12)


def test_a_forward_or_a_late_recomputation_without_gates_is_an_error_not_silence(parts):
    base, groups = parts
    holder = GateHolder(required=True)
    layer = StackedLoraLinear(base, groups, holder).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="without gates"):
        layer(x)
    with holder.scope(torch.rand(2, 3, dtype=torch.float64)):
        y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="without gates"):
        y.sum().backward()
    with holder.scope(torch.rand(3, 3)), pytest.raises(RuntimeError, match="3 samples, but a batch of 2"):
        layer(x)


def test_zero_gates_leave_the_base_bit_for_bit(parts):
    base, groups = parts
    holder = GateHolder(required=True)
    layer = StackedLoraLinear(base, groups, holder)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    with holder.scope(torch.zeros(1, 3)):
        assert torch.equal(layer(x), base(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_attach_freezes_the_base_first_and_detach_restores_it():
    net = Net()
    plain = {name: p.clone() for name, p in net.named_parameters()}
    state = initial_state(net, {"first": 2}, None, 0)
    adapter = attach(net, [Group("lora", state, trainable=True)])
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["first.down_RI", "first.up_OR"]
    assert list(adapter.parameters()) == ["first.down", "first.up"]
    assert torch.count_nonzero(adapter.parameters()["first.up"]) == 0
    with pytest.raises(RuntimeError, match="already has an adapter"):
        attach(net, [Group("again", state, trainable=True)])
    adapter.detach()
    assert {name for name, _ in net.named_parameters()} == set(plain)
    assert all(torch.equal(p, plain[name]) for name, p in net.named_parameters())


def test_states_come_out_by_group_as_they_went_in():
    net = Net()
    states = [AdapterState({"first": LowRank(torch.randn(r, 4), torch.randn(4, r), alpha=r / 2)}, {"k": str(r)})
              for r in (1, 3)]
    states[1].entries["second"] = LowRank(torch.randn(2, 4), torch.randn(3, 2), alpha=1.0)
    adapter = attach(net, [Group("a", states[0], trainable=False), Group("b", states[1], trainable=True)])
    for name, state in zip("ab", states, strict=True):
        out = adapter.state(name)
        assert out.metadata == state.metadata and out.entries.keys() == state.entries.keys()
        for path, entry in state.entries.items():
            assert torch.equal(out.entries[path].down, entry.down) and torch.equal(out.entries[path].up, entry.up)
            assert out.entries[path].alpha == entry.alpha


def test_wrong_modules_and_shapes_are_refused_by_name():
    entry = LowRank(torch.randn(1, 5), torch.randn(4, 1), 1.0)
    with pytest.raises(UserError, match=r"'fist'.*did you mean 'first'"):
        attach(Net(), [Group("x", AdapterState({"fist": entry}, {}), True)])
    with pytest.raises(UserError, match="'x' at first maps 5 -> 4 features, but the model's layer maps 4 -> 4"):
        attach(Net(), [Group("x", AdapterState({"first": entry}, {}), True)])


def test_initial_weights_do_not_depend_on_what_else_is_trained():
    one = initial_state(Net(), {"second": 2}, None, 5, "x").entries["second"]
    both = initial_state(Net(), {"first": 2, "second": 2}, None, 5, "x").entries["second"]
    other = initial_state(Net(), {"second": 2}, None, 6, "x").entries["second"]
    assert torch.equal(one.down, both.down) and not torch.equal(one.down, other.down)
    assert one.down.abs().max() <= 0.5  # 1 / sqrt(4)


def test_targets_follow_the_recipe():
    rules = [TargetRule(2, {"self_attn.q": 8, "cross_attn.o": 4}), TargetRule(1, {"ffn.0": 4, "self_attn.q": 0})]
    assert resolve_targets(rules, 3) == {
        "blocks.1.attn1.to_q": 8, "blocks.1.attn2.to_out.0": 4, "blocks.2.attn2.to_out.0": 4,
        "blocks.2.ffn.net.0.proj": 4,
    }
    with pytest.raises(UserError, match=r"unknown projection 'self_attn\.qq'"):
        resolve_targets([TargetRule(None, {"self_attn.qq": 4})], 3)
    with pytest.raises(UserError, match="last 4 blocks; this model has 3"):
        resolve_targets([TargetRule(4, {"self_attn.q": 4})], 3)
    with pytest.raises(UserError, match="no module is left"):
        resolve_targets([TargetRule(None, {"self_attn.q": 0})], 3)
