"""CLIP and PickScore from transformers folders; tokenizers; the parts that all rewards share."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_cases import MERGES, SMALL, VOCABULARY, write_merges
from torch.nn import functional as F

from lapwan import console
from lapwan.errors import UserError
from lapwan.rewards.base import EmbeddingCache, score, select_frames, warn_chinese
from lapwan.rewards.build import build_rewards, check_rewards, reward_bytes
from lapwan.rewards.clip import ClipReward, activation_elements, find_tokenizer, load_tokenizer
from lapwan.rewards.open_clip import Tower
from lapwan.settings.rewards import ClipSettings, HpsSettings, PickScoreSettings, TinyRewardSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIPModel with its tokenizer, as a hub folder lies on disk."""
    from transformers import CLIPModel

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = CLIPModel(SMALL.config())
    for parameter in model.parameters():  # transformers' own draw leaves all captions nearly alike
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(path)
    load_tokenizer(write_merges(tmp_path_factory.mktemp("merges")), VOCABULARY, 77).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [ClipSettings, PickScoreSettings])
def test_a_folder_gives_scaled_cosines_with_gradient(folder, kind):
    from transformers import CLIPModel, CLIPTokenizer

    reward = build_rewards((kind(path=folder),), "cpu")[kind(path=folder).label]
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    captions = ["the hook", "red"]
    direct, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073),
                                                         (0.26862954, 0.26130258, 0.27577711)))
    out = direct(input_ids=tokenizer(captions, padding=True, return_tensors="pt").input_ids,
                 pixel_values=(pixels - mean) / std)
    torch.testing.assert_close(score(reward, pixels, captions), out.logits_per_image.diagonal(), rtol=0, atol=1e-4)
    assert reward.scale == pytest.approx(1 / 0.07, rel=1e-3) and reward.english_text
    text = reward.text(captions)
    assert text.norm(dim=-1).tolist() == pytest.approx([1, 1]) and not text.requires_grad
    image = reward.image(pixels.requires_grad_())
    assert image.dtype == torch.float32 and image.norm(dim=-1).tolist() == pytest.approx([1, 1])
    (gradient,) = torch.autograd.grad((image * reward.text(captions)).sum(), pixels)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0 and torch.isfinite(gradient).all()


def test_the_gradient_is_the_difference_quotient(folder):
    reward = build_rewards((ClipSettings(path=folder),), "cpu")["clip"]
    pixels = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(3)).requires_grad_()
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(4))

    def value(at: torch.Tensor) -> torch.Tensor:
        return (reward.image(at) * reward.text(["red"])).sum()

    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    with torch.no_grad():
        quotient = (value(pixels + 1e-2 * direction) - value(pixels - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(quotient), rel=0.02, abs=2e-4)


def test_several_rewards_by_label(folder):
    settings = (ClipSettings(path=folder), PickScoreSettings(path=folder, name="pick", preprocess="squash"))
    rewards = build_rewards(settings, "cpu")
    assert list(rewards) == ["clip", "pick"] and [r.name for r in rewards.values()] == ["clip", "pick"]
    wide = torch.rand(1, 3, 16, 32)
    assert not torch.allclose(rewards["clip"].image(wide), rewards["pick"].image(wide))  # crop is not squash
    with pytest.raises(UserError, match="'tiny' is not for this command"):
        build_rewards((TinyRewardSettings(),), "cpu")


def test_a_folder_that_is_not_a_clip_model(folder, tmp_path):
    def refused(message: str, path: Path) -> None:
        for call in (check_rewards, lambda r: build_rewards(r, "cpu")):
            with pytest.raises(UserError, match=message):
                call((PickScoreSettings(path=path, tokenizer=folder),))

    refused("no folder .*PickScore_v1.*hf download", tmp_path / "none")
    refused("no config.json.*PickScore_v1", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    refused("type 't5', not 'clip'.*PickScore_v1", tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    refused("no weights", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = json.loads((folder / "config.json").read_text())
    for part, key, value in (("vision_config", "image_size", 10**9), ("text_config", "num_hidden_layers", 10**6)):
        (tmp_path / "config.json").write_text(json.dumps(config | {part: config[part] | {key: value}}))
        refused(f"{part}.{key} = {value}: must be less than", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read the model"):
        build_rewards((PickScoreSettings(path=tmp_path, tokenizer=folder),), "cpu")


def test_a_folder_with_a_tensor_missing(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors.*visual_projection.weight"):
        build_rewards((ClipSettings(path=tmp_path, tokenizer=folder),), "cpu")


def test_merges_and_folder_are_one_tokenizer(folder, tmp_path):
    """Ids of CLIP that anyone can look up: the bytes come first, so `a` is 320 and `!` is 256 in every CLIP."""
    merges = load_tokenizer(write_merges(tmp_path), VOCABULARY, 77)
    again = load_tokenizer(find_tokenizer(None, folder, ""), VOCABULARY, 77)
    start, end = VOCABULARY - 2, VOCABULARY - 1
    for tokenizer in (merges, again):
        assert tokenizer("A !").input_ids == [start, 320, 256, end]
        assert tokenizer("the red hook").input_ids[1:3] == [512 + MERGES.index(m) for m in ("th e</w>", "re d</w>")]
    text = "The hook's tip, 剪刀 — 42 %"
    assert merges(text).input_ids == again(text).input_ids


def test_a_wrong_tokenizer(folder, tmp_path):
    with pytest.raises(UserError, match="do not belong together"):
        load_tokenizer(folder, 100, 77)
    broken = tmp_path / "bpe.txt.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(broken, VOCABULARY, 77)
    with gzip.open(broken, "wt") as file:
        file.write("title\nthree words here\n")
    with pytest.raises(UserError, match="joins no known pieces"):
        load_tokenizer(broken, VOCABULARY, 77)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path, VOCABULARY, 77)


def test_a_caption_is_encoded_once_and_alone():
    cache, asked = EmbeddingCache(), []

    def encode(captions: list[str]) -> torch.Tensor:
        asked.append(tuple(captions))
        return torch.tensor([[float(len(c))] for c in captions])

    assert cache.get(["a", "bb", "a"], encode).flatten().tolist() == [1, 2, 1]
    assert cache.get(["bb", "ccc"], encode).flatten().tolist() == [2, 3]
    assert asked == [("a",), ("bb",), ("ccc",)]


def test_chinese_captions_before_an_english_encoder(folder, capsys):
    rewards = build_rewards((ClipSettings(path=folder),), "cpu")
    console.set_level(console.NORMAL)
    warn_chinese(rewards, ["a hook", "剪刀剪断血管"])
    message = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 captions hold Chinese" in message and "clip knows English only" in message
    warn_chinese(rewards, ["a hook"])
    assert capsys.readouterr().err == ""


def test_memory_is_weights_and_what_the_graph_keeps(folder):
    from transformers import CLIPModel

    shape = replace(SMALL, vision=Tower(64, 8, 4), image=32)
    model = CLIPModel(shape.config()).eval().requires_grad_(False)
    reward = ClipReward("clip", model, load_tokenizer(folder, VOCABULARY, 77), "crop")
    pixels = torch.rand(2, 3, 32, 32).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = reward.image(pixels)
    predicted = 2 * activation_elements(shape.config()) * 4
    assert held.requires_grad and predicted == pytest.approx(sum(kept.values()), rel=0.05)
    total = reward_bytes((ClipSettings(path=folder, dtype="fp32"),), "cpu", images=2)
    parameters = sum(p.numel() for p in CLIPModel(SMALL.config()).parameters())
    assert total == 4 * (parameters + 2 * activation_elements(SMALL.config()))
    hps = reward_bytes((HpsSettings(path=Path("HPS.pt")),), "cuda", images=0)
    assert hps == 2 * 986_109_441  # bf16 on a GPU


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (24, 56), (56, 24), (9, 16)])
def test_conventions(size):
    from lapwan.rewards.preprocess import to_square

    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(5))
    pad, squash, crop = (to_square(pixels, 16, c) for c in ("pad", "squash", "crop"))
    height, width = size

    def direct(h: int, w: int) -> torch.Tensor:
        return F.interpolate(pixels, (h, w), mode="bicubic", antialias=True, align_corners=False)

    torch.testing.assert_close(squash, direct(16, 16), rtol=0, atol=2e-5)
    if height == width:
        assert torch.equal(pad, squash) and torch.equal(crop, squash)
        return
    long, short = (round(16 * n / max(size)) for n in size), (round(16 * n / min(size)) for n in size)
    small, large = direct(*long), direct(*short)
    inside = pad[..., pad.abs().sum(dim=(0, 1, 3)) > 0, :][..., pad.abs().sum(dim=(0, 1, 2)) > 0]
    torch.testing.assert_close(inside, small, rtol=0, atol=2e-5)
    empty = 16 * 16 - inside[0, 0].numel()
    assert int((pad[0].abs().sum(dim=0) == 0).sum()) == empty > 0  # the rest is black, before normalising
    top, left = (large.shape[-2] - 16) // 2, (large.shape[-1] - 16) // 2
    torch.testing.assert_close(crop, large[..., top:top + 16, left:left + 16], rtol=0, atol=2e-5)


def test_resizing_has_the_exact_gradient_and_linear_kernel():
    from lapwan.rewards.preprocess import resize, resize_matrix

    pixels = torch.rand(1, 2, 12, 10, dtype=torch.float64).requires_grad_()
    resized = F.interpolate(pixels.float(), (5, 7), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(resize(pixels.float(), 5, 7, "bilinear"), resized, rtol=0, atol=1e-5)
    weights = torch.rand(1, 2, 5, 7, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((resize(pixels, 5, 7) * weights).sum(), pixels)
    back = resize_matrix(12, 5, "bicubic").double().T @ weights @ resize_matrix(10, 7, "bicubic").double()
    torch.testing.assert_close(gradient, back, rtol=0, atol=1e-12)


def test_which_frames_are_scored():
    assert select_frames(17, "first") == [0] and select_frames(1, "all") == [0]
    assert select_frames(17, "all") == list(range(17))
    assert select_frames(17, 1) == [0] and select_frames(17, 3) == [0, 8, 16] and select_frames(5, 9) == [0, 1, 2, 3, 4]
