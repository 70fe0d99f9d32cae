"""The fast forward on a GPU: compiled as eager, nothing in it that waits for the device. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.lora.attach import Adapter, Group, attach, initial_state
from lapwan.lora.targets import TargetRule, resolve_targets
from lapwan.models.base import Base
from lapwan.names import NoiseExpert, Precision
from lapwan.sampling.denoise import Conditions, guided_velocity
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.block import block_forward, eager_block, fused_block
from lapwan.wan.transformer.compile import compile_time
from lapwan.wan.transformer.forward import first_frame_times

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def prepared(tiny_t2v, dtype: torch.dtype):
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH, dtype, "cuda"))
    ranks = resolve_targets([TargetRule(3, dict.fromkeys(PROJECTIONS, 4))], len(model.transformer.blocks))
    groups = []
    for column in range(2):
        state = initial_state(model.transformer, ranks, None, column)
        for entry in state.entries.values():
            entry.up.normal_(std=0.05, generator=torch.Generator().manual_seed(column))
        groups.append(Group(str(column), state, trainable=True))
    adapter = attach(model.transformer, groups, gates_required=True)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 16, 5, 16, 16, device="cuda", generator=generator)
    text = torch.randn(2, 512, 96, device="cuda", generator=generator)
    return model, adapter, x, torch.tensor([950.0, 900.0], device="cuda"), text


def gradients(model, adapter: Adapter, x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
    gates = torch.tensor([[0.7, 0.4], [0.2, 0.9]], device="cuda", requires_grad=True)
    for parameter in adapter.parameters().values():
        parameter.grad = None
    with adapter.holder.scope(gates):
        v = model.velocity(x, t, text)
        v.square().mean().backward()
    return [v.detach(), gates.grad, *(p.grad for p in adapter.parameters().values())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["off", "op", "block"])
def test_compiled_blocks_are_eager_ones(tiny_t2v, dtype, tolerance, kind):
    model, adapter, *given = prepared(tiny_t2v, dtype)
    model.checkpoint(kind)
    eager = gradients(model, adapter, *given)
    model.compile()
    compiled = gradients(model, adapter, *given)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())
    graphs = compile_time()[1]
    gradients(model, adapter, *given)
    assert compile_time()[1] == graphs  # eight blocks, three structures, none compiled twice


def test_a_step_and_a_guided_evaluation_wait_for_nothing(tiny_t2v):
    model, adapter, x, t, text = prepared(tiny_t2v, torch.bfloat16)
    gradients(model, adapter, x, t, text)  # what is made once, such as tables
    mode = torch.cuda.get_sync_debug_mode()
    step, gates = torch.tensor(700.0), torch.ones(1, 2, device="cuda")
    both = Conditions(text[:1], text[1:])
    try:
        torch.cuda.set_sync_debug_mode("error")
        with adapter.holder.scope(gates):
            model.velocity(x, t, text).square().mean().backward()
            with torch.no_grad():
                guided_velocity(model, x[:1], step, both, 3.0)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_guidance_in_one_batch_is_two_passes(tiny_t2v):
    model, adapter, x, _, text = prepared(tiny_t2v, torch.float32)
    both, step = Conditions(text[:1], text[1:]), torch.tensor(700.0)
    with torch.no_grad(), adapter.holder.scope(torch.ones(1, 2, device="cuda")):
        ours, theirs = (guided_velocity(model, x[:1], step, both, 3.0, together) for together in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [768, 13824])
def test_our_kernels_are_torchs_operations(columns):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(300, columns, device="cuda", generator=generator).bfloat16()
    x[7] = 0
    exact = F.gelu(x.float(), approximate="tanh")
    codes, scale = kernels.gelu_quantise(x)
    torch.testing.assert_close(scale.squeeze(1)[:7], exact.abs().amax(dim=1)[:7] / 448, rtol=1e-5, atol=0)
    back = codes.float() * scale
    # Half a step of e4m3: 1/16 of a number, or of the smallest normal one.
    assert bool(((back - exact).abs() <= exact.abs() / 15.9 + scale * 2**-10).all())
    assert bool((codes[7].float() == 0).all()) and float(scale[7]) == 1.0
    weight = torch.randn(512, columns, device="cuda", generator=generator).bfloat16() * columns**-0.5
    bias = torch.randn(512, device="cuda", generator=generator).bfloat16()
    wanted = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
    torch.testing.assert_close(kernels.linear_gelu(x, weight, bias).float(), wanted, rtol=1e-2, atol=1e-2)


def alike(ours: Tensor, theirs: Tensor) -> None:
    """To a step of bf16; e4m3 codes to a neighbour, and that seldom."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if ours.dtype == torch.float8_e4m3fn:
        steps = [torch.where(codes < 0, -(codes & 127), codes)  # a sign and a magnitude: -0 is 0
                 for codes in (v.cpu().view(torch.int8).int() for v in (ours, theirs))]
        apart = (steps[0] - steps[1]).abs()
        assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.02
    else:
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("columns", [768, 5120])
@pytest.mark.parametrize(("rows", "runs"), [(1, (34, 0)), (2, (17, 0)), (2, (17, 5)), (4, (17, 5))])
def test_norms_and_rope_are_torchs_operations(columns, rows, runs):
    """The kernels against what a CPU computes for the same operation; `runs`: tokens of a sample, and how many of them
    have the first of two rows."""
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    generator, tokens = torch.Generator().manual_seed(0), 34
    x, out = (random(tokens, columns).bfloat16() for _ in range(2))
    mul, add, gate = (random(rows, columns) for _ in range(3))
    angles = random(tokens // 2, 128)
    cos, sin = angles.cos(), angles.sin() * torch.tensor([-1.0, 1.0]).repeat(64)
    cases = [(kernels.add_norm, (x, *before, mul, add, 1e-6, eight, *runs))
             for before in ((None, None), (out, None), (out, gate)) for eight in (False, True)]
    cases += [(kernels.rms_rotate, (x, mul[0].bfloat16(), *tables, 1e-6)) for tables in ((None, None), (cos, sin))]
    cases += [(kernels.quantise_rows, (x,)), (kernels.add_gated, (x, out, gate, *runs))]
    for operation, given in cases:
        found = [operation(*(v.to(device) if isinstance(v, Tensor) else v for v in given))
                 for device in ("cuda", "cpu")]
        for ours, theirs in zip(*([one] if isinstance(one, Tensor) else one for one in found), strict=True):
            alike(ours, theirs)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("precision", [None, Precision.FP8])
def test_a_forward_with_our_kernels_is_one_without(tiny_t2v, precision, clean):
    """`clean`: with two timesteps in each sequence."""
    if precision is None:
        model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH, torch.bfloat16, "cuda"))
    else:
        model = Base(tiny_t2v).load(NoiseExpert.HIGH, torch.bfloat16, "cuda", Recipe(precision))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 16, 5, 16, 16, device="cuda", generator=generator)
    text = torch.randn(2, 512, 96, device="cuda", generator=generator)
    t, velocities = torch.tensor([950.0, 900.0], device="cuda"), {}
    if clean:
        t = first_frame_times(t, torch.tensor([True, False], device="cuda"), x.shape[2:], (1, 2, 2))
    with torch.no_grad():
        for name, block in (("fused", fused_block), ("eager", eager_block), ("chosen", block_forward)):
            model.options.block = block
            velocities[name] = model.velocity(x, t, text)
        model.use_diffusers_forward()
        reference = model.velocity(x, t, text)
    for velocity in velocities.values():
        assert float((velocity - reference).norm()) <= 3e-2 * float(reference.norm())
    assert torch.equal(velocities["chosen"], velocities["fused"])
    assert not torch.equal(velocities["chosen"], velocities["eager"])  # the kernels took part
