"""What lapwan writes loads in diffusers' `load_lora_weights`, for either transformer, with equal outputs.

diffusers needs `peft` for the last step; what its readers make of the files is tested without it.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from lora_cases import make_transformer, random_state, shapes, velocity

from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank

OUTER = {"condition_embedder.text_embedder.linear_1": (24, 16), "condition_embedder.time_proj": (144, 24),
         "proj_out": (64, 24)}
SUBSETS = {"all": shapes(), "blocks 1-2, some": shapes([1, 2], ["self_attn.q", "cross_attn.o", "ffn.0"]),
           "outer too": shapes() | OUTER}


def pipeline() -> WanPipeline:
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
                       transformer=make_transformer(1), transformer_2=make_transformer(2), boundary_ratio=0.9)


def mixed(sizes: dict[str, tuple[int, int]]) -> AdapterState:
    """Ranks and alphas that differ by module."""
    entries: dict[str, LowRank] = {}
    for n, (path, size) in enumerate(sizes.items()):
        entries |= random_state({path: size}, rank=2 + n % 2, alpha=1.0 + n % 3, seed=n).entries
    return AdapterState(entries)


CASES = pytest.mark.parametrize(("layout", "subset"), [
    ("comfy", "all"), ("comfy", "blocks 1-2, some"), ("comfy", "outer too"),
    ("diffusers", "all"), ("diffusers", "blocks 1-2, some"), ("diffusers", "outer too"),
    ("musubi", "all"),  # diffusers' own reader of the musubi layout knows whole blocks only
])


@CASES
@pytest.mark.parametrize("fold_alpha", [False, True])
def test_diffusers_reads_the_same_update(tmp_path, layout, subset, fold_alpha):
    if layout == "musubi" and fold_alpha:
        pytest.skip("diffusers' own reader of the musubi layout needs alpha")
    state = mixed(SUBSETS[subset])
    write_lora(tmp_path / "x.safetensors", state, layout=layout, fold_alpha=fold_alpha)
    tensors, metadata = WanPipeline.lora_state_dict(tmp_path / "x.safetensors", return_lora_metadata=True)
    assert all("lora" in key for key in tensors)  # anything else makes load_lora_weights raise
    assert len(tensors) == 2 * len(state.entries)
    for path, entry in state.entries.items():
        down, up = (tensors[f"transformer.{path}.lora_{part}.weight"].double() for part in "AB")
        scale = 1.0
        if metadata is not None:
            said = {key.removeprefix("transformer."): value for key, value in metadata.items()}
            rank = said["rank_pattern"].get(path, said["r"])
            assert rank == entry.rank
            scale = said["alpha_pattern"].get(path, said["lora_alpha"]) / rank
        assert (scale * up @ down - entry.delta(torch.float64)).abs().max() < 1e-6, path


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="diffusers loads LoRA files through peft")
@pytest.mark.parametrize("second", [False, True])
@CASES
def test_loads_with_equal_outputs(tmp_path, layout, subset, second):
    state = mixed(SUBSETS[subset])
    write_lora(tmp_path / "x.safetensors", state, layout=layout)
    pipe = pipeline()
    untouched, touched = (pipe.transformer, pipe.transformer_2) if second else (pipe.transformer_2, pipe.transformer)
    want = make_transformer(2 if second else 1).double()
    for path, entry in state.entries.items():
        want.get_submodule(path).weight.data += entry.delta(torch.float64)
    before = velocity(make_transformer(1 if second else 2))
    pipe.load_lora_weights(tmp_path / "x.safetensors", load_into_transformer_2=second)
    assert (velocity(touched) - velocity(want)).abs().max() < 1e-5
    assert torch.equal(velocity(untouched), before)
