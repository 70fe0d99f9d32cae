"""A base with LoRAs merged in memory is, bit for bit, the merged folder whose fingerprint it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapwan.commands import merge as merge_command
from lapwan.errors import UserError
from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.settings.merge import MergeSettings
from lapwan.settings.model import BaseModelSettings
from lapwan.tiny.resolve import resolve_base

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


def stored_as(spec: ModelSpec, folder: Path, dtype: torch.dtype) -> Path:
    """The model with its transformers' weights in another dtype, the low-noise one's in two shards."""
    shutil.copytree(spec.path, folder, symlinks=False)
    for noise_expert in NoiseExpert:
        (file,) = weight_files(folder / noise_expert.component)
        # bf16 values times a number that is none: full mantissas in fp32 and fp16
        tensors = {name: (t.float() * 1.01).to(dtype).contiguous() for name, t in load_file(file).items()}
        file.unlink()
        if noise_expert is HIGH:
            save_file(tensors, file, metadata={"format": "pt"})
            continue
        names = sorted(tensors)
        shards = {f"{file.stem}-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
        for shard, shard_names in shards.items():
            save_file({name: tensors[name] for name in shard_names}, file.with_name(shard), metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: shard for shard, shard_names in shards.items() for n in shard_names}}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    return folder


def write_loras(folder: Path, dtype: torch.dtype) -> dict[NoiseExpert, Path]:
    """Two blocks of each noise expert, in sizes that do not vanish in the weights' own rounding."""
    paths = {}
    for n, noise_expert in enumerate(NoiseExpert):
        generator = torch.Generator().manual_seed(n)
        state = AdapterState({
            f"blocks.{block}.attn1.{name}": LowRank(
                torch.randn(5, 192, generator=generator).to(dtype),
                0.02 * torch.randn(192, 5, generator=generator).to(dtype), 3.0)
            for block in (1, 6) for name in ("to_q", "to_out.0")
        }, {"lapwan.noise_expert": noise_expert.value})
        paths[noise_expert] = folder / f"x_{noise_expert.file_suffix}.safetensors"
        write_lora(paths[noise_expert], state)
    return paths


@pytest.mark.parametrize(("stored", "lora"), [
    (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float32),
    *(pytest.param(*dtypes, marks=pytest.mark.slow) for dtypes in (
        (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)))])
def test_merged_in_memory_is_the_merged_folder(tmp_path, tiny_t2v, stored, lora):
    model, paths = stored_as(tiny_t2v, tmp_path / "model", stored), write_loras(tmp_path, lora)
    options = {"model": str(model), "lora": [f"{e.value}={p}:0.7" for e, p in paths.items()],
            "output": str(tmp_path / "merged")}
    list(merge_command.merge(load(MergeSettings, options=options, environment={}), RunOptions()))
    ours = resolve_base(BaseModelSettings(model=str(model), lora=paths, multiplier=0.7))
    theirs, plain = resolve_base(str(tmp_path / "merged")), resolve_base(str(model))
    for noise_expert in NoiseExpert:
        assert ours.fingerprint(noise_expert) == theirs.fingerprint(noise_expert) != plain.fingerprint(noise_expert)
        for dtype in (torch.float32, torch.bfloat16):
            merged, expected, before = (
                dict(base.load(noise_expert, dtype).transformer.named_parameters()) for base in (ours, theirs, plain))
            for name, value in expected.items():
                assert torch.equal(merged[name], value) and merged[name].dtype == value.dtype
            changed = {name for name in merged if not torch.equal(merged[name], before[name])}
            assert changed == {f"blocks.{b}.attn1.{n}.weight" for b in (1, 6) for n in ("to_q", "to_out.0")}


def test_what_a_merge_refuses_a_base_refuses(tmp_path, tiny_t2v):
    wrong = AdapterState({"blocks.6.attn1.to_q": LowRank(torch.ones(2, 64), torch.ones(192, 2), 2.0)})
    write_lora(tmp_path / "x.safetensors", wrong)
    with pytest.raises(UserError, match=r"'blocks.6.attn1.to_q' changes a weight \[192, 64\].*has \[192, 192\]"):
        resolve_base(BaseModelSettings(model=str(tiny_t2v.path), lora={LOW: tmp_path / "x.safetensors"}))
    wrong.entries["blocks.6.attn1.to_q"] = LowRank(torch.full((2, 192), float("nan")), torch.ones(192, 2), 2.0)
    write_lora(tmp_path / "x.safetensors", wrong)
    with pytest.raises(UserError, match=r"'diffusion_model.blocks.6.self_attn.q.lora_A.weight' holds NaN or infinity"):
        resolve_base(BaseModelSettings(model=str(tiny_t2v.path), lora={LOW: tmp_path / "x.safetensors"}))
