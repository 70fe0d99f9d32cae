"""HPS v2.1 in open_clip's layout: loads strictly, agrees with plain torch, and says what is wrong with a wrong file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clip_cases import SMALL, VOCABULARY, random_tensors, write_hps, write_merges
from plain_clip import cosine, image_embedding, text_embedding
from safetensors.torch import save_file

from lapwan.errors import UserError
from lapwan.rewards.base import score
from lapwan.rewards.build import build_rewards, check_rewards, reward_bytes
from lapwan.rewards.clip import ClipReward, load_tokenizer
from lapwan.rewards.open_clip import HPS_FILE, VIT_H_14, load_checkpoint, read_checkpoint
from lapwan.settings.rewards import HpsSettings

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
CAPTIONS = ["the hook burns tissue", "a red vessel; " + "the hook " * 90, "钩"]


def _reward(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[ClipReward, dict[str, torch.Tensor]]:
    tensors = write_hps(tmp_path / HPS_FILE, SMALL)
    tokenizer = load_tokenizer(write_merges(tmp_path), SMALL.vocabulary, SMALL.context)
    return ClipReward("hps", load_checkpoint(tmp_path / HPS_FILE, dtype, SMALL), tokenizer, "pad", 1.0), tensors


def test_scores_are_those_of_a_plain_implementation(tmp_path):
    reward, tensors = _reward(tmp_path)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = reward._tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77,
                               return_tensors="pt").input_ids
    assert tokens.shape == (3, 77) and (tokens[:, 0] == VOCABULARY - 2).all() and tokens[1, 76] == VOCABULARY - 1
    image = image_embedding(tensors, (pixels - MEAN) / STD, SMALL.vision.heads)
    text = text_embedding(tensors, tokens, SMALL.text.heads)
    torch.testing.assert_close(score(reward, pixels, CAPTIONS), cosine(image, text), rtol=0, atol=1e-5)
    every = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    torch.testing.assert_close(reward.image(pixels) @ reward.text(CAPTIONS).T, every, rtol=0, atol=1e-5)
    assert every.std() > 0.05  # random weights, yet every pair has its own score


def test_bf16_stays_near(tmp_path):
    pixels = torch.rand(2, 3, 16, 16)
    wide, narrow = _reward(tmp_path)[0], _reward(tmp_path, torch.bfloat16)[0]
    assert narrow.image(pixels).dtype == torch.float32
    torch.testing.assert_close(narrow.image(pixels), wide.image(pixels), rtol=0, atol=0.02)
    torch.testing.assert_close(narrow.text(CAPTIONS), wide.text(CAPTIONS), rtol=0, atol=0.02)


@pytest.mark.slow
def test_full_size_loads_strictly_and_agrees(tmp_path):
    """986 million random parameters (2 GB in fp16 on disk, 4 GB in memory)."""
    write_hps(tmp_path / HPS_FILE, VIT_H_14, torch.float16)
    model = load_checkpoint(tmp_path / HPS_FILE, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 986_109_441
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens = torch.full((2, 77), 49407)
    tokens[:, 0], tokens[0, 1:20], tokens[1, 1:70] = 49406, torch.arange(19) * 2500, torch.arange(69) * 700
    with torch.no_grad():
        mine = torch.stack([model.get_image_features((pixels - MEAN) / STD).pooler_output,
                            model.get_text_features(tokens).pooler_output])
        model = None
        tensors = {n: t.float() for n, t in read_checkpoint(tmp_path / HPS_FILE).items()}
        image = image_embedding(tensors, (pixels - MEAN) / STD, VIT_H_14.vision.heads)
        text = text_embedding(tensors, tokens, VIT_H_14.text.heads)
    torch.testing.assert_close(cosine(*mine), cosine(image, text), rtol=0, atol=1e-4)
    torch.testing.assert_close(cosine(mine[0], image), torch.ones(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(cosine(mine[1], text), torch.ones(2), rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_is_as_planned_and_bf16_near_fp32(tmp_path):
    write_hps(tmp_path / HPS_FILE, VIT_H_14, torch.float16)
    write_merges(tmp_path, 48_894)
    pixels = torch.rand(4, 3, 512, 384, device="cuda")
    results = {}
    for dtype in ("bf16", "fp32"):
        settings = (HpsSettings(path=tmp_path / HPS_FILE, dtype=dtype),)
        before = torch.cuda.memory_allocated()
        reward = build_rewards(settings, "cuda")["hps"]
        image = reward.image(pixels.requires_grad_())
        held = torch.cuda.memory_allocated() - before
        assert held == pytest.approx(reward_bytes(settings, "cuda", images=4), rel=0.1)
        (gradient,) = torch.autograd.grad((image @ reward.text(CAPTIONS).T).sum(), pixels)
        results[dtype] = (image.detach() @ reward.text(CAPTIONS).T, gradient)
        del reward, image
    torch.testing.assert_close(results["bf16"][0], results["fp32"][0], rtol=0, atol=0.02)
    both = torch.nn.functional.cosine_similarity(*(g.flatten() for _, g in results.values()), dim=0)
    assert both > 0.9


def test_a_tensor_too_many_or_too_few_or_of_another_shape(tmp_path):
    path, tensors = tmp_path / HPS_FILE, random_tensors(SMALL)
    for change, message in (
        ({**tensors, "visual.transformer.resblocks.7.ln_1.weight": torch.ones(32)}, "does not belong"),
        ({n: t for n, t in tensors.items() if n != "transformer.resblocks.1.mlp.c_fc.bias"}, "lacks 1 tensors"),
        ({**tensors, "positional_embedding": torch.zeros(50, 24)}, r"\[50, 24\]"),
    ):
        torch.save({"state_dict": change}, path)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path, torch.float32, SMALL)


def _wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    lora = folder / "lora.safetensors"
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, lora)
    keys, small, cut, text = (folder / name for name in ("keys.pt", "small.pt", "cut.pt", "text.pt"))
    torch.save({"model": {"weight": torch.zeros(2)}}, keys)
    write_hps(small, SMALL)
    cut.write_bytes(small.read_bytes()[:9000])
    text.write_text("not weights")
    return {
        "none": (folder / "none.pt", "no such file.*hf download xswu/HPSv2"),
        "folder": (folder, f"no such file.*{HPS_FILE}"),
        "lora": (lora, "is not HPS v2.1.*visual.conv1.weight"), "keys": (keys, "is not a state dict|is not HPS v2.1"),
        "small": (small, r"vision width 32 and patch 4.*1280"), "cut": (cut, "cannot read"),
        "text": (text, "cannot read"),
    }


@pytest.mark.parametrize("which", ["none", "folder", "lora", "keys", "small", "cut", "text"])
def test_a_wrong_file_is_answered_in_one_line(tmp_path, which):
    path, message = _wrong_files(tmp_path)[which]
    for call in (lambda: check_rewards((HpsSettings(path=path),)), lambda: load_checkpoint(path, torch.float32)):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "weights_only" not in str(error.value)  # torch's advice to execute what the file holds
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_without_a_tokenizer_it_says_what_to_give(tmp_path):
    path = tmp_path / HPS_FILE
    torch.save({"state_dict": random_tensors(SMALL)}, path)
    with pytest.raises(UserError, match=r"no CLIP tokenizer in .*tokenizer.json.*merges.txt.*bpe_simple.*tokenizer = "):
        build_rewards((HpsSettings(path=path),), "cpu")


def test_the_whole_vocabulary_has_clips_size(tmp_path):
    tokenizer = load_tokenizer(write_merges(tmp_path, 48_894), VIT_H_14.vocabulary, 77)
    assert tokenizer("a !").input_ids == [49406, 320, 256, 49407]
