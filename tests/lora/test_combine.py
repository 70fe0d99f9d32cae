"""lapwan merge without a model: sums of LoRAs, resizing, conversion."""

from __future__ import annotations

import pytest
import torch
from lora_cases import merge, shapes

from lapwan.errors import UserError
from lapwan.lora.formats import read_lora
from lapwan.names import NoiseExpert


def deltas(state) -> dict[str, torch.Tensor]:
    return {path: entry.delta(torch.float64) for path, entry in state.entries.items()}


def test_sum_of_loras_by_concatenation(tmp_path, saved):
    a = saved("a.safetensors", seed=1, rank=3, alpha=5.0)
    b = saved("b.safetensors", seed=2, rank=2, sizes=shapes([0, 1]), layout="musubi")
    merge(lora=[f"{a}:0.8", f"{b}:0.5"], output=tmp_path / "sum.safetensors", format="diffusers")
    (one,), (two,), (got,) = (read_lora(p).values() for p in (a, b, tmp_path / "sum.safetensors"))
    assert got.entries["blocks.0.ffn.net.2"].rank == 5 and got.entries["blocks.2.ffn.net.2"].rank == 3
    for path, delta in deltas(got).items():
        want = 0.8 * deltas(one)[path] + (0.5 * deltas(two)[path] if path in two.entries else 0)
        assert (delta - want).abs().max() < 1e-6


def test_resize_is_the_best_approximation_and_says_the_energy(tmp_path, saved, capsys):
    a, b = saved("a.safetensors", seed=1, rank=6), saved("b.safetensors", seed=2, rank=6)
    merge(lora=[str(a), str(b)], rank="4", output=tmp_path / "small.safetensors")
    (one,), (two,), (got,) = (read_lora(p).values() for p in (a, b, tmp_path / "small.safetensors"))
    kept = everything = 0.0
    for path, delta in deltas(got).items():
        u, s, vh = torch.linalg.svd(deltas(one)[path] + deltas(two)[path])
        assert (delta - u[:, :4] * s[:4] @ vh[:4]).abs().max() < 1e-5
        kept, everything = kept + (s[:4] ** 2).sum().item(), everything + (s**2).sum().item()
        assert got.entries[path].rank == 4
    assert f"keeps {kept / everything:.4%}" in capsys.readouterr().out


def test_one_input_is_a_conversion_with_the_same_content(tmp_path, saved):
    a = saved("a.safetensors", alpha=2.0, dtype=torch.bfloat16, metadata={"lapwan.noise_expert": "low", "ss_tag": "x"})
    merge(lora=[str(a)], output=tmp_path / "b.safetensors", format="musubi")
    (one,), (two,) = read_lora(a).values(), read_lora(tmp_path / "b.safetensors").values()
    assert one.fingerprint() == two.fingerprint() and two.metadata["ss_tag"] == "x"
    merge(lora=[f"{a}:0.5"], output=tmp_path / "half.safetensors", dtype="float32")
    (half,) = read_lora(tmp_path / "half.safetensors").values()
    for path, delta in deltas(half).items():
        assert torch.equal(delta, 0.5 * deltas(one)[path])
        assert half.entries[path].up.dtype == torch.float32


def test_loras_of_different_noise_experts_do_not_add_by_accident(tmp_path, pair, saved):
    high, low = pair.values()
    with pytest.raises(UserError, match="different noise experts"):
        merge(lora=[str(high), str(low)], output=tmp_path / "x.safetensors")
    merge(lora=[f"high={high}", f"low={low}"], output=tmp_path / "x.safetensors", format="musubi")
    for noise_expert, path in pair.items():
        written = tmp_path / f"x_{noise_expert.file_suffix}.safetensors"
        ((said, state),) = read_lora(written).items()
        assert said is noise_expert and deltas(state).keys() == deltas(next(iter(read_lora(path).values()))).keys()
    plain = saved("plain.safetensors", seed=11)
    merge(lora=[str(high), str(plain)], output=tmp_path / "y.safetensors")
    assert list(read_lora(tmp_path / "y.safetensors")) == [NoiseExpert.HIGH]
    with pytest.raises(UserError, match="one of the inputs"):
        merge(lora=[str(high)], output=high, overwrite=True)


def test_parts_have_strengths_of_their_own(tmp_path, saved):
    """Blocks and projections of one file, given once for each strength; in a LoRA and in a model."""
    a = saved("a.safetensors", seed=1, rank=3)
    merge(lora=[f"{a}:0.5@blocks.0-1@attn1", f"{a}:-2@ffn"], output=tmp_path / "sum.safetensors")
    (one,), (got,) = (read_lora(path).values() for path in (a, tmp_path / "sum.safetensors"))
    strengths = {path: 0.5 if ".attn1." in path and path[7] in "01" else -2.0 if ".ffn." in path else None
                 for path in one.entries}
    assert got.entries.keys() == {path for path, strength in strengths.items() if strength is not None}
    for path, delta in deltas(got).items():
        torch.testing.assert_close(delta, strengths[path] * deltas(one)[path])
    with pytest.raises(UserError, match=r"none of its modules lies in @blocks.30-39.*; it has .* in blocks 0 to \d"):
        merge(lora=[f"{a}:1@blocks.30-39"], output=tmp_path / "none.safetensors")


def test_a_minus_b(tmp_path, saved):
    a, b = saved("a.safetensors", seed=1, rank=3), saved("b.safetensors", seed=2, rank=2)
    merge(lora=[str(a), f"{b}:-1"], output=tmp_path / "slider.safetensors")
    (one,), (two,), (got,) = (read_lora(p).values() for p in (a, b, tmp_path / "slider.safetensors"))
    for path, delta in deltas(got).items():
        torch.testing.assert_close(delta, deltas(one)[path] - deltas(two)[path], rtol=1e-5, atol=1e-6)
