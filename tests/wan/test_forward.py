"""Our forward over diffusers' modules, compared with theirs, and with and without each optimisation (fp64)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from lapwan.lora.attach import Adapter, Group, attach
from lapwan.lora.layer import StackedLoraLinear, project
from lapwan.lora.state import AdapterState, LowRank
from lapwan.names import NoiseExpert
from lapwan.sampling.denoise import Conditions, guided_velocity
from lapwan.tiny.model import TRANSFORMER
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.transformer.block import block_forward
from lapwan.wan.transformer.checkpointing import selective_block
from lapwan.wan.transformer.forward import TokenTimes
from lapwan.wan.transformer.prompt import Prompt

EXACT = {"rtol": 0, "atol": 1e-10}
BLOCKS, FIRST = 4, 2
ADAPTED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "ffn.net.0.proj")


@pytest.fixture
def model() -> WanBackbone:
    torch.manual_seed(0)
    made = WanTransformer3DModel(in_channels=16, **{**TRANSFORMER, "num_layers": BLOCKS}).double().eval()
    made.requires_grad_(False)
    return WanBackbone(made)


def given(model: WanBackbone, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels, dtype = model.transformer.config.in_channels, model.dtype
    x = torch.randn(batch, channels, 3, 6, 8, generator=generator, dtype=dtype)
    text = torch.randn(batch, 12, model.transformer.config.text_dim, generator=generator, dtype=dtype)
    return x, torch.tensor([900.0, 312.5, 40.0][:batch]), text


def adapted(model: WanBackbone, modules: tuple[str, ...] = ADAPTED, groups: int = 3) -> Adapter:
    """Random groups of different ranks in the last blocks, one of them frozen."""
    made = []
    for column in range(groups):
        generator = torch.Generator().manual_seed(column)
        entries = {}
        for block in range(FIRST, BLOCKS):
            for module in modules:
                base = model.transformer.get_submodule(f"blocks.{block}.{module}")
                rank = column + 2
                down = torch.randn(rank, base.in_features, generator=generator).double() * 0.1
                up = torch.randn(base.out_features, rank, generator=generator).double() * 0.1
                entries[f"blocks.{block}.{module}"] = LowRank(down, up, 3.0)
        made.append(Group(str(column), AdapterState(entries, {}), trainable=column > 0))
    return attach(model.transformer, made, gates_required=True)


GATES = torch.tensor([[0.7, 0.2, 0.9], [0.1, 0.8, 0.4]], dtype=torch.float64)


def gradients(
    model: WanBackbone, adapter: Adapter, run: Callable[[], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Velocity, and gradients of the adapter and the gates, of a loss inside the gates' scope."""
    x, t, text = given(model)
    gates = GATES.clone().requires_grad_()
    for parameter in adapter.parameters().values():
        parameter.grad = None
    with adapter.holder.scope(gates):
        v = model.velocity(x, t, text) if run is None else run()
        v.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in adapter.parameters().items() if p.grad is not None}
    return v.detach(), {**grads, "gates": gates.grad}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **EXACT, msg=name)


def reference(model: WanBackbone, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model.transformer(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]


@pytest.mark.parametrize("noise_expert", list(NoiseExpert))
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_forward_is_diffusers(task, noise_expert, tiny_t2v, tiny_i2v):
    model = WanBackbone(load_transformer(tiny_t2v if task == "t2v" else tiny_i2v, noise_expert))
    x, t, text = given(model)
    with torch.no_grad():
        theirs = reference(model, x, t, text)
        torch.testing.assert_close(model.velocity(x, t, text), theirs, rtol=1e-5, atol=1e-5)
    assert float(theirs.std()) > 0.1


def test_a_timestep_for_each_token_is_diffusers_and_so_are_a_few_distinct_ones(tiny_t2v):
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.LOW))
    x, _, text = given(model)
    rows = torch.arange(36) >= 12  # the first of three latent frames of 3 x 4 patches is clean
    values = torch.tensor([[0.0, 600.0], [0.0, 250.0]])
    every = values[:, rows.long()]
    with torch.no_grad():
        theirs = reference(model, x, every, text)
        torch.testing.assert_close(model.velocity(x, every, text), theirs, rtol=1e-5, atol=1e-5)
        few = model.velocity(x, TokenTimes(values, (12, 24)), text)
        torch.testing.assert_close(few, theirs, rtol=1e-5, atol=1e-5)
        alike = model.velocity(x, torch.tensor(600.0).expand(2), text)  # one row for the whole batch
        torch.testing.assert_close(alike, reference(model, x, torch.full((2,), 600.0), text), rtol=1e-5, atol=1e-5)


def test_in_bf16_as_near_to_fp32_as_diffusers(tiny_t2v):
    wide = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH))
    narrow = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.HIGH, torch.bfloat16))
    x, t, text = given(wide)
    with torch.no_grad():
        exact = reference(wide, x, t, text)
        ours = narrow.velocity(x, t, text) - exact
        theirs = reference(narrow, x.bfloat16(), t, text.bfloat16()) - exact
    assert float(ours.norm()) < 1.1 * float(theirs.norm())


def test_the_prefix_without_a_graph_has_the_full_graphs_gradients(model):
    adapter = adapted(model)
    x, t, text = given(model)
    seen: list[bool] = []

    def watched(*arguments: object) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return block_forward(*arguments)

    model.options.block = watched
    v, ours = gradients(model, adapter)
    assert seen == [False] * FIRST + [True] * (BLOCKS - FIRST)
    seen.clear()
    whole, theirs = gradients(model, adapter, lambda: model.velocity(x.requires_grad_(), t, text))
    assert seen == [True] * BLOCKS and x.grad is not None  # whoever asks for the input's gradient gets it
    torch.testing.assert_close(v, whole, **EXACT)
    equal(ours, theirs)


def test_gates_with_gradient_alone_make_a_graph(model):
    adapter = adapted(model)
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(False)
    _, grads = gradients(model, adapter)
    assert float(grads["gates"].abs().min()) > 0


def test_layers_that_share_an_input_are_each_layer_alone(model):
    adapter = adapted(model, ("attn1.to_q", "attn1.to_v"))
    attention = model.transformer.blocks[BLOCKS - 1].attn1
    layers = [attention.to_q, attention.to_k, attention.to_v]  # to_k is a plain Linear
    assert [isinstance(layer, StackedLoraLinear) for layer in layers] == [True, False, True]
    start = torch.randn(2, 5, layers[1].in_features, dtype=torch.float64)
    results = []
    for together in (True, False):
        x, gates = start.clone().requires_grad_(), GATES.clone().requires_grad_()
        for parameter in adapter.parameters().values():
            parameter.grad = None
        with adapter.holder.scope(gates):
            outputs = project(layers, x) if together else [layer(x) for layer in layers]
            sum(y.square().sum() * (i + 1) for i, y in enumerate(outputs)).backward()
            with torch.no_grad():
                without = project(layers, x) if together else [layer(x) for layer in layers]
        for y, z in zip(outputs, without, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
        layer_grads = [p.grad for n, p in adapter.parameters().items() if n.startswith(f"blocks.{BLOCKS - 1}.")]
        results.append([*outputs, x.grad, gates.grad, *layer_grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "whole"), [("op", 0), ("block", 0), ("off", 1), ("op", 1)])
def test_recomputation_has_the_gradients_of_keeping(model, kind, whole):
    adapter = adapted(model)
    v, plain = gradients(model, adapter)
    model.checkpoint(kind, whole)
    calls: list[int] = []

    class Count:
        def ready(self, index: int) -> None:
            calls.append(index)

        def done(self, index: int) -> None:
            calls.append(index)

    model.stream(Count())
    again, recomputed = gradients(model, adapter)
    torch.testing.assert_close(v, again, **EXACT)
    equal(plain, recomputed)
    forward = [index for index in range(BLOCKS) for _ in range(2)]
    assert calls[: len(forward)] == forward  # the weights are asked for block by block, and again in the backward
    assert set(calls[len(forward) :]) == set(range(FIRST, BLOCKS if kind != "off" else FIRST + whole))


def test_diffusers_own_forward_has_the_same_velocity_and_recomputes_too(model):
    adapter, calls = adapted(model), []
    v, ours = gradients(model, adapter)
    model.transformer.blocks[BLOCKS - 1].attn2.to_v.register_forward_hook(lambda *_: calls.append(1))
    model.checkpoint("block")
    model.use_diffusers_forward()
    x, t, text = given(model)
    again, theirs = gradients(model, adapter, lambda: model.velocity(x.requires_grad_(), t, text))
    torch.testing.assert_close(v, again, rtol=0, atol=1e-5)  # diffusers embeds the time in fp32
    assert len(calls) == 2 and ours.keys() == theirs.keys()


def conditions(model: WanBackbone, batch: int, image: bool) -> tuple[Tensor, Conditions]:
    x, _, text = given(model, batch)
    negative = given(model, batch, seed=5)[2]
    first = torch.randn(batch, 16, 1, 6, 8, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    return x, Conditions(text, negative, first_BC1HW=first if image else None)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_in_one_batch_is_two_passes(model, batch, image):
    adapter = adapted(model, (*ADAPTED, "attn2.to_k"))
    x, both = conditions(model, batch, image)
    with torch.no_grad(), adapter.holder.scope(GATES[:batch]):
        ours, theirs = (guided_velocity(model, x, torch.tensor(700.0), both, 3.5, batched) for batched in (True, False))
        without = guided_velocity(model, x, torch.tensor(700.0), both, 1.0)
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert float((ours - without).abs().max()) > 1e-3


@pytest.mark.parametrize("modules", [(), ADAPTED, (*ADAPTED, "attn2.to_k"), (*ADAPTED, "attn2.to_v")])
def test_kept_text_keys_and_values_are_computed_ones(model, modules):
    adapter = adapted(model, modules) if modules else None
    other = WanBackbone(
        WanTransformer3DModel(in_channels=16, **{**TRANSFORMER, "num_layers": BLOCKS}).double().eval())
    x, _, text = given(model)
    prompt = Prompt(text)
    steps = ((model, 900.0, 1.0), (model, 500.0, 0.3), (other, 400.0, 1.0), (model, 30.0, 2.0))
    with torch.no_grad():
        for backbone, timestep, gates in steps:
            t = torch.full((2,), timestep)
            with adapter.holder.scope(gates * GATES) if adapter else nullcontext():
                ours, theirs = (backbone.velocity(x, t, features) for features in (prompt, text))
                torch.testing.assert_close(ours, theirs, **EXACT)
            with adapter.holder.scope(gates * GATES[:1]) if adapter else nullcontext():
                part = backbone.velocity(x[:1], t[:1], prompt.first(1))
                torch.testing.assert_close(part, backbone.velocity(x[:1], t[:1], text[:1]), **EXACT)


def test_the_second_step_of_a_prompt_computes_no_text_keys(model):
    x, t, text = given(model)
    calls: list[int] = []
    for block in model.transformer.blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    prompt = Prompt(text)
    with torch.no_grad():
        model.velocity(x, t, prompt)
        model.velocity(x, t, prompt)
        model.velocity(x[:1], t[:1], prompt.first(1))
        assert len(calls) == BLOCKS
        model.forget_prompts()
        model.velocity(x[:1], t[:1], prompt.first(1))
        model.velocity(x, t, prompt)
        assert len(calls) == 2 * BLOCKS


def kept_bytes(model: WanBackbone, adapter: Adapter) -> int:
    """Of what a forward keeps for its backward, weights left out."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, t, text = given(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), adapter.holder.scope(GATES):
        v = model.velocity(x, t, text)
    weights = {p.untyped_storage().data_ptr() for p in model.transformer.parameters()}
    del v
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_a_compiled_block_keeps_what_it_is_told(model):
    """Through torch.compile's own partition into forward and backward, without its code generation."""
    adapter, options = adapted(model), model.options
    plain, all_kept = gradients(model, adapter)[1], kept_bytes(model, adapter)
    options.block, options.selective = (torch.compile(function, backend="aot_eager_decomp_partition", dynamic=False)
                                  for function in (block_forward, selective_block))
    options.checkpointing = "op"
    equal(gradients(model, adapter)[1], plain)
    assert kept_bytes(model, adapter) < 0.75 * all_kept  # by itself a compiled block keeps more than 0.8


@pytest.mark.slow  # a C++ compiler at work for a minute
@pytest.mark.parametrize("kind", ["off", "op"])
def test_compiled_blocks_are_eager_ones(model, kind, monkeypatch, tmp_path):
    from lapwan.wan.transformer.compile import compile_time

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model.transformer.float()
    adapter = adapted(model)
    for layer in adapter.layers.values():
        layer.float()
    results = []
    model.checkpoint(kind)
    for compiled in (False, True):
        model.compile(compiled)
        results.append(gradients(model, adapter))
    (v, ours), (again, theirs) = results
    torch.testing.assert_close(v, again, rtol=1e-5, atol=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6 + 1e-4 * float(gradient.abs().max()))
    assert compile_time()[1] >= 3  # without a graph, the first with one, the others


@pytest.mark.parametrize("path", ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"])
def test_adapters_on_the_time_layers_act_for_each_sample(model, path):
    """Samples of one timestep share a row of the time embedding, but not with different gates."""
    path = f"condition_embedder.{path}"
    base = model.transformer.get_submodule(path)
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(2, base.in_features, generator=generator).double() * 0.1
    up = torch.randn(base.out_features, 2, generator=generator).double() * 0.1
    x, _, text = given(model)
    timestep = torch.tensor(700.0).expand(2)
    before = model.velocity(x, timestep, text)
    state = AdapterState({path: LowRank(down, up, 2.0)}, {})
    adapter = attach(model.transformer, [Group("a", state, False)], gates_required=True)
    with adapter.holder.scope(torch.tensor([[0.0], [1.0]], dtype=torch.float64)):
        both = model.velocity(x, timestep, text)
    with adapter.holder.scope(torch.ones(1, 1, dtype=torch.float64)):
        second = model.velocity(x[1:], timestep[1:], text[1:])
    torch.testing.assert_close(both[0], before[0], **EXACT)
    torch.testing.assert_close(both[1:], second, **EXACT)
    assert (both[1] - before[1]).abs().max() > 1e-4
