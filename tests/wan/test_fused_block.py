"""The fused block equals the eager block: in the kernels' torch forms (fp64), and those equal the Triton kernels."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from lapwan.names import Precision
from lapwan.tiny.model import TRANSFORMER
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.linears import LINEAR_CLASSES
from lapwan.wan.quantise.load import fill, linears_of
from lapwan.wan.transformer.block import BlockFunction, eager_block, fused_applies, fused_block
from lapwan.wan.transformer.kernels import Triton


def made(dtype: torch.dtype) -> WanBackbone:
    torch.manual_seed(0)
    model = WanTransformer3DModel(in_channels=16, **{**TRANSFORMER, "num_layers": 3}).to(dtype).eval()
    for block in model.blocks:  # as trained: neither ones nor zeros
        for name in ("norm2.weight", "norm2.bias", "attn1.norm_q.weight", "attn1.norm_k.weight", "attn2.norm_q.weight"):
            block.get_parameter(name).data.normal_(1.0, 0.3)
    return WanBackbone(model.requires_grad_(False))


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 3, 6, 8, generator=generator).to(dtype)
    return x, torch.tensor([900.0, 312.5]), torch.randn(2, 12, TRANSFORMER["text_dim"], generator=generator).to(dtype)


@torch.no_grad()
def velocity(model: WanBackbone, block: BlockFunction, *inputs: Tensor) -> Tensor:
    model.options.block = block
    return model.velocity(*inputs)


@pytest.mark.parametrize("alike", [False, True])
def test_it_is_the_eager_block(alike):
    """With a timestep for each sample, and with one row of modulation for both."""
    x, t, text = given(torch.float64)
    t = torch.tensor(700.0).expand(2) if alike else t
    plain, ours = (velocity(made(torch.float64), block, x, t, text) for block in (eager_block, fused_block))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def test_the_compiler_takes_it_whole():
    """Its lists of outputs and optional arguments, without generating code."""
    model, inputs = made(torch.float32), given(torch.float32)
    compiled = torch.compile(fused_block, backend="aot_eager", dynamic=False, fullgraph=True)
    assert torch.equal(velocity(model, compiled, *inputs), velocity(model, fused_block, *inputs))


def test_a_step_with_a_graph_or_with_timesteps_per_token_takes_the_eager_path():
    """Meta tensors stand for a GPU's, as in the memory plan."""
    block = made(torch.bfloat16).transformer.blocks[0]
    width = block.attn1.to_q.in_features

    def x(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
        return torch.empty(2, 36, width, dtype=dtype, device=device)

    def modulation(samples: int, rows: int) -> Tensor:
        return torch.empty(samples, rows, 6, width, device="meta")

    with torch.no_grad():
        assert all(fused_applies(block, x(), modulation(samples, 1), None) for samples in (1, 2))
        assert not fused_applies(block, x(), modulation(2, 36), None)
        assert not fused_applies(block, x(), modulation(1, 2), torch.zeros(36, dtype=torch.int64))
        assert not fused_applies(block, x(torch.float32), modulation(2, 1), None)
        assert not fused_applies(block, x(device="cpu"), modulation(2, 1), None)
    assert not fused_applies(block, x(), modulation(2, 1), None)


def test_in_fp8_it_rounds_where_the_eager_block_does():
    """Codes go from kernel to product; without a GPU the product is emulated."""
    model = made(torch.float32)
    transformer = model.transformer
    source = {n: lambda p=p: p.data.clone() for n, p in transformer.named_parameters()}
    fill(transformer, source, linears_of(transformer.blocks, "blocks"), Precision.FP8, lambda name, stored: stored,
         torch.device("cpu"), None)
    assert isinstance(transformer.blocks[0].ffn.net[2], LINEAR_CLASSES[Precision.FP8])
    inputs = given(torch.float32)
    plain, ours = (velocity(model, block, *inputs) for block in (eager_block, fused_block))
    exact = velocity(made(torch.float32), eager_block, *inputs)
    assert float((ours - plain).norm()) < 0.3 * float((plain - exact).norm())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may work")
def test_without_a_compiler_torchs_operations_run(capsys):
    triton = Triton(installed=True)
    for _ in range(2):
        triton.try_on(torch.device("cuda"))
    assert not triton.works
    assert capsys.readouterr().err.count("Triton cannot build kernels here (") == 1


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch's CUDA builds")
def test_the_kernels_are_their_torch_forms():
    program = Path(__file__).with_name("triton_parity.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "alike", done.stderr[-2000:]
