"""Quantised Linears against their definitions, their gradients, their files, and what they do to the trained model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapwan.lora.attach import Group, attach, initial_state
from lapwan.models.base import Base
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.backbone import load_transformer
from lapwan.wan.quantise.linears import LINEAR_CLASSES, NF4_CODES, Fp8Linear, quantise_fp8
from lapwan.wan.quantise.load import RECIPE_VERSION, Recipe, cache_folder

ALL = list(Precision)


def layer(precision: Precision, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 128, generator=generator) / 11
    bias = torch.randn(96, generator=generator)
    return weight, bias.to(dtype), LINEAR_CLASSES[precision].from_weight(weight, bias.to(dtype))


def reference(precision: Precision, weight: torch.Tensor) -> torch.Tensor:
    """W̃ entry by entry, in fp64."""
    out = torch.empty_like(weight, dtype=torch.float64)
    for o, row in enumerate(weight.double()):
        if precision is Precision.NF4:
            for first in range(0, len(row), 64):
                part = row[first : first + 64]
                scale = float(part.abs().max().to(torch.bfloat16))
                nearest = [min(NF4_CODES, key=lambda c, v=v: abs(c - v)) for v in (part / scale).tolist()]
                out[o, first : first + 64] = torch.tensor(nearest, dtype=torch.float64) * scale
        elif precision is Precision.INT8:
            scale = row.abs().max() / 127
            out[o] = (row / scale).round() * scale
        else:
            # e4m3: 3 bits after the point from 2^-6 on, steps of 2^-9 below.
            scale = row.abs().max() / 448
            value = row / scale
            step = 2.0 ** (value.abs().clamp(min=2.0**-6).log2().floor() - 3)
            out[o] = (value / step).round() * step * scale
    return out


@pytest.mark.parametrize("precision", ALL)
def test_the_weight_is_its_definition(precision) -> None:
    weight, _, made = layer(precision)
    torch.testing.assert_close(made.weight_as(torch.float64), reference(precision, weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("precision", "bound"), [(Precision.FP8, 0.04), (Precision.INT8, 0.01), (Precision.NF4, 0.11)])
def test_relative_error_of_a_weight(precision, bound) -> None:
    weight, _, made = layer(precision)
    error = ((made.weight_as(torch.float32) - weight).norm() / weight.norm()).item()
    assert bound / 3 < error < bound


@pytest.mark.parametrize("precision", ALL)
def test_rows_and_groups_of_zeros_stay_zero(precision) -> None:
    made = LINEAR_CLASSES[precision].from_weight(torch.zeros(16, 128), None)
    assert torch.equal(made.weight_as(torch.float32), torch.zeros(16, 128))
    assert torch.equal(made(torch.randn(3, 128)), torch.zeros(3, 16))


@pytest.mark.parametrize("precision", ALL)
def test_the_largest_of_a_row_survives(precision) -> None:
    """No overflow at the top of the range; it is a code of every form."""
    weight = torch.zeros(16, 128)
    weight[:, 5] = torch.linspace(-300.0, 300.0, 16)
    made = LINEAR_CLASSES[precision].from_weight(weight, None).weight_as(torch.float32)
    torch.testing.assert_close(made, weight, rtol=4e-3, atol=0)


def test_tiles_of_rows_give_the_same_bytes() -> None:
    for precision in ALL:
        weight, bias, whole = layer(precision)
        tiled = LINEAR_CLASSES[precision].from_weight(weight, bias, tile=5 * 128)
        assert torch.equal(whole.codes.view(torch.uint8), tiled.codes.view(torch.uint8))
        assert torch.equal(whole.scale, tiled.scale)


def test_fp8_multiplies_rounded_inputs_by_rounded_weights() -> None:
    _, bias, made = layer(Precision.FP8)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1)) * 30
    codes, scale = quantise_fp8(x)
    expected = F.linear((codes.double() * scale.double()), made.weight_as(torch.float64), bias.double())
    torch.testing.assert_close(made(x).double(), expected, rtol=1e-5, atol=1e-5)
    shared = made.multiply(codes.flatten(0, 1), scale.flatten(0, 1), torch.float32).unflatten(0, (2, 7))
    assert torch.equal(shared, made(x))


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.NF4])
def test_weight_only_multiplies_inputs_as_they_are(precision) -> None:
    _, bias, made = layer(precision)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made(x), F.linear(x, made.weight_as(torch.float32), bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ALL)
def test_the_inputs_gradient_is_that_of_the_quantised_weight(precision, dtype) -> None:
    made = layer(precision, dtype=dtype)[2]
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = made(x)
    assert y.dtype == dtype and not list(made.parameters())
    with torch.no_grad():
        assert torch.equal(made(x), y)
    y.backward(grad)
    assert torch.equal(x.grad, grad @ made.weight_as(dtype))


@pytest.mark.parametrize("precision", ALL)
def test_nothing_as_large_as_a_weight_is_kept_for_backward(precision) -> None:
    made = layer(precision)[2]
    buffers = {t.untyped_storage().data_ptr() for t in made.buffers()}
    kept: list[int] = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in buffers:
            kept.append(tensor.nbytes)
        return tensor

    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(x)
    assert sum(kept) == 0


@pytest.mark.parametrize("precision", ALL)
def test_a_lora_trains_on_it_with_the_gradients_of_its_plain_twin(precision) -> None:
    """The stacked layer over a quantised base is the one over an nn.Linear that holds W̃."""
    base = nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 64)).requires_grad_(False)
    twin = nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 64)).requires_grad_(False)
    state = initial_state(base, {"0": 4}, None, 7)
    state.entries["0"].up.normal_(generator=torch.Generator().manual_seed(3))
    for path in ("0", "2"):
        plain = base.get_submodule(path)
        if not LINEAR_CLASSES[precision].supports(plain.in_features, plain.out_features):
            twin.get_submodule(path).load_state_dict(plain.state_dict())
            continue
        made = LINEAR_CLASSES[precision].from_weight(plain.weight, plain.bias)
        setattr(base, path, made)
        twin.get_submodule(path).weight.data.copy_(made.weight_as(torch.float32))
        twin.get_submodule(path).bias.data.copy_(plain.bias)
    adapters = [attach(model, [Group("lora", state, trainable=True)]) for model in (base, twin)]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    outputs = []
    for model in (base, twin):
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    tolerance = {"rtol": 0.15, "atol": 2.0} if precision is Precision.FP8 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outputs[0], outputs[1], **tolerance)
    for ours, theirs in zip(*(a.parameters().values() for a in adapters), strict=True):
        cosine = F.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert cosine > 0.999


def inputs(spec, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, *spec.latent_shape(5, 32, 48), generator=generator)
    text = torch.randn(1, 512, spec.text_dim, generator=generator) * 0.3
    return x, torch.tensor([700.0]), text


def _same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8)), name


@pytest.fixture
def cache(own_cache) -> Path:
    return own_cache / "quantised"


@pytest.mark.parametrize("precision", ALL)
def test_loading_quantised_is_loading_and_then_quantising_and_so_is_the_kept_one(precision, tiny_t2v, cache) -> None:
    base, recipe = Base(tiny_t2v), Recipe(precision, frozenset({6, 7}))
    first = base.load(NoiseExpert.HIGH, torch.float32, recipe=recipe).transformer
    plain = load_transformer(tiny_t2v, NoiseExpert.HIGH)
    count = 0
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            ours = first.get_submodule(name)
            if name.startswith("blocks.") and int(name.split(".")[1]) < 6:
                expected = LINEAR_CLASSES[precision].from_weight(module.weight, module.bias)
                assert torch.equal(ours.codes.view(torch.uint8), expected.codes.view(torch.uint8)), name
                assert torch.equal(ours.scale, expected.scale) and torch.equal(ours.bias, module.bias)
                count += 1
            else:
                assert torch.equal(ours.weight, module.weight)
    assert count == 60
    [folder] = cache.iterdir()
    stamps = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(stamps) == 6
    again = base.load(NoiseExpert.HIGH, torch.float32, recipe=recipe).transformer
    _same(first, again)
    assert stamps == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    # Fewer trained blocks: what is there is used, what is missing is added.
    base.load(NoiseExpert.HIGH, torch.float32, recipe=Recipe(precision))
    assert len(list(folder.iterdir())) == 8


def test_a_damaged_kept_block_is_made_again_and_a_kill_leaves_none(tiny_t2v, cache) -> None:
    base, recipe = Base(tiny_t2v), Recipe(Precision.INT8)
    first = base.load(NoiseExpert.LOW, recipe=recipe).transformer
    [folder] = cache.iterdir()
    (folder / "block_003.safetensors").write_bytes(b"cut short")
    (folder / "block_004.safetensors").unlink()
    _same(first, base.load(NoiseExpert.LOW, recipe=recipe).transformer)
    assert (folder / "block_003.safetensors").stat().st_size == (folder / "block_005.safetensors").stat().st_size
    assert not [file for file in folder.iterdir() if "tmp" in file.name]


def test_other_weights_another_precision_or_another_version_is_another_folder() -> None:
    assert len({cache_folder(f, p) for f in ("a", "b") for p in ALL}) == 6
    digest = hashlib.sha256(f"{RECIPE_VERSION}\0fp8\0a".encode()).hexdigest()
    assert cache_folder("a", Precision.FP8).name == f"fp8-{digest[:24]}"


# In a process of its own, whose allocator gives back what is freed: else it is other tests' memory that is measured.
MEASURE = """
import gc, json, sys
from pathlib import Path
from lapwan.names import NoiseExpert, Precision
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.wan.quantise.load import Recipe

spec = ModelSpec.__new__(ModelSpec)
object.__setattr__(spec, "path", Path(sys.argv[1]))
object.__setattr__(spec, "noise_experts", (NoiseExpert.HIGH,))

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

def load():
    return Base(spec).load(NoiseExpert.HIGH, recipe=Recipe(Precision.FP8))

load()  # imports and buffers of the first time
peaks = []
for kept in (True, False):
    if not kept:
        for file in Path(sys.argv[2]).glob("**/*.safetensors"):
            file.unlink()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = load()
    peaks.append(status("VmHWM") - before)
    del model
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_loading_never_holds_two_copies(tmp_path, cache) -> None:
    """240 MB of fp32 weights become 61 MB; at the peak there are those and the few tensors that are being quantised."""
    from diffusers import WanTransformer3DModel

    config = {"patch_size": [1, 2, 2], "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 16,
              "out_channels": 16, "text_dim": 64, "freq_dim": 64, "ffn_dim": 2048, "num_layers": 14,
              "cross_attn_norm": True}
    WanTransformer3DModel(**config).save_pretrained(tmp_path / "model" / "transformer", max_shard_size="50MB")
    thrifty = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(cache)], env=thrifty,
                          capture_output=True, text=True, check=True)
    kept, quantised = json.loads(done.stdout)
    assert kept < 90e6 and quantised < 120e6, done.stdout


@pytest.mark.parametrize(("precision", "bound"), [(Precision.FP8, 0.07), (Precision.INT8, 0.02), (Precision.NF4, 0.18)])
def test_error_of_each_block_of_the_trained_model(precision, bound, tiny_t2v, cache) -> None:
    """Relative error of what each block adds, on the inputs the unquantised model gives it; and of the velocity."""
    plain = load_transformer(tiny_t2v, NoiseExpert.LOW)
    quantised = Base(tiny_t2v).load(NoiseExpert.LOW, recipe=Recipe(precision))
    seen = []
    hooks = [block.register_forward_hook(lambda m, args, out: seen.append((args, out))) for block in plain.blocks]
    with torch.no_grad():
        exact = plain(hidden_states=inputs(tiny_t2v)[0], timestep=inputs(tiny_t2v)[1],
                      encoder_hidden_states=inputs(tiny_t2v)[2], return_dict=False)[0]
        for hook in hooks:
            hook.remove()
        errors = []
        for block, (args, out) in zip(quantised.transformer.blocks, seen, strict=True):
            added = out - args[0]
            errors.append(float((block(*args) - out).norm() / added.norm()))
        v = quantised.velocity(*inputs(tiny_t2v))
    assert max(errors) < bound and min(errors) > bound / 30
    cosine = F.cosine_similarity(v.flatten(), exact.flatten(), dim=0)
    assert cosine > 1 - bound**2


def test_fp8_layers_say_their_size() -> None:
    assert repr(layer(Precision.FP8)[2]) == "Fp8Linear(128 -> 96)"
    assert isinstance(layer(Precision.FP8)[2], Fp8Linear)
