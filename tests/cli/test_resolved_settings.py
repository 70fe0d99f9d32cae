"""What a command did stands beside what it made, as settings that load to the same."""

from __future__ import annotations

import torch

from lapwan.lora.formats import read_lora, write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.settings.cache import CacheSettings
from lapwan.settings.load import load
from lapwan.settings.merge import MergeSettings
from lapwan.tiny.dataset import write_dataset


def test_a_cache_keeps_the_settings_that_make_it_again(succeed, tmp_path):
    clips = write_dataset(tmp_path / "clips", clips=4, seed=1, size=(32, 32), frames=5)
    succeed("cache", "--dataset", clips, "--model", "tiny", "-o", "cache", "--size", "32x32", "--num-frames", "5")
    kept = tmp_path / "cache" / "lapwan_settings.toml"
    settings = load(CacheSettings, kept, environment={})
    assert settings.dataset == clips and settings.output == tmp_path / "cache" and settings.size == (32, 32)
    before = kept.stat().st_mtime_ns
    index = (tmp_path / "cache" / "lapwan_index.jsonl").read_bytes()
    succeed("cache", "--config", kept)
    assert kept.stat().st_mtime_ns == before and (tmp_path / "cache" / "lapwan_index.jsonl").read_bytes() == index


def test_a_merge_keeps_the_settings_that_repeat_it(succeed, tmp_path, tiny_t2v):
    state = AdapterState({"blocks.0.attn1.to_q": LowRank(torch.randn(2, 192), torch.randn(192, 2), 2.0)},
                         {"lapwan.noise_expert": "low"})
    write_lora(tmp_path / "a.safetensors", state)
    succeed("merge", "--model", "tiny", "--lora", "low=a.safetensors:0.5", "-o", "merged")
    succeed("merge", "--lora", "a.safetensors", "--format", "diffusers", "-o", "b.safetensors")
    for kept, output in (("merged.settings.toml", "merged"), ("b.settings.toml", "b.safetensors")):
        settings = load(MergeSettings, tmp_path / kept, environment={})
        assert settings.output == tmp_path / output
        assert [str(lora.path) for lora in settings.lora] == [str(tmp_path / "a.safetensors")]
    (tmp_path / "b.safetensors").unlink()
    succeed("merge", "--config", "b.settings.toml")
    [again] = read_lora(tmp_path / "b.safetensors").values()
    assert again.fingerprint() == state.fingerprint()
