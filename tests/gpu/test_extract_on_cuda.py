"""`lapwan merge --extract` on a GPU: the same LoRA as on the CPU, within rounding."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lapwan.checkpoints.weights import read_weights
from lapwan.lora.extract import RankChoice, extract

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_extraction_is_that_of_the_cpu(tmp_path):
    generator = torch.Generator().manual_seed(2)
    base, tuned = {}, {}
    for block in range(3):
        for name, shape in (("self_attn.q", (1024, 768)), ("ffn.0", (2048, 768))):
            weight = torch.randn(shape, generator=generator) * 0.03
            left, right = (torch.randn(n, 24, generator=generator) * 0.8 ** torch.arange(24) for n in shape)
            key = f"blocks.{block}.{name}.weight"
            base[key] = weight.bfloat16()
            tuned[key] = (base[key].float() + 1e-3 * left @ right.T).bfloat16()
    for name, tensors in (("tuned", tuned), ("base", base)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [[read_weights(tmp_path / f"{name}.safetensors")] for name in ("tuned", "base")]
    for choice in (RankChoice(16), RankChoice(256, 0.95)):
        on_cpu, on_gpu = (extract(*files, choice, dtype=torch.float32, device=torch.device(device))
                          for device in ("cpu", "cuda"))
        assert list(on_cpu.state.entries) == list(on_gpu.state.entries)
        assert on_gpu.floor == pytest.approx(on_cpu.floor) and on_gpu.kept() == pytest.approx(on_cpu.kept(), rel=1e-3)
        assert on_gpu.relative_error == pytest.approx(on_cpu.relative_error, rel=1e-3)
        for path, entry in on_cpu.state.entries.items():
            want, got = entry.delta(), on_gpu.state.entries[path].delta()
            assert float((want - got).norm() / want.norm()) < 0.02, path  # the last directions differ by their sketch
