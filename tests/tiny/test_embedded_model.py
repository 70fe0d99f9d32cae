"""The embedded model as shipped: what loads is what was evaluated, in both layouts."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.tiny.model import WEIGHTS, make_tokenizer, tiny_folder

SHIPPED = ("transformer", "transformer_2", "vae", "text_encoder", "evaluator", "judge")


def test_readme_states_the_hash_of_every_file() -> None:
    readme = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `([\w.]+)` \|.*\| `([0-9a-f]{64})` \|$", readme, flags=re.MULTILINE))
    assert {f"{name}.safetensors" for name in SHIPPED} | {"latents.json"} == set(stated)
    for name, digest in stated.items():
        assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == digest


def test_all_weights_together_stay_under_32_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 32e6


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_what_loads_is_what_is_shipped(task: str, tiny_t2v: ModelSpec, tiny_i2v: ModelSpec) -> None:
    spec = {"t2v": tiny_t2v, "i2v": tiny_i2v}[task]
    for noise_expert in NoiseExpert:
        shipped = load_file(WEIGHTS / f"{noise_expert.component}.safetensors")
        folder = load_file(spec.component(noise_expert) / "diffusion_pytorch_model.safetensors")
        patch = shipped["patch_embedding.weight"]
        shipped["patch_embedding.weight"] = patch[:, :16] if task == "t2v" else patch
        assert patch.shape[1] == 36 and shipped.keys() == folder.keys()
        for name, value in folder.items():
            assert torch.equal(value, shipped[name].float()), name


def test_both_pipelines_of_diffusers_open_it(tiny_t2v: ModelSpec, tiny_i2v: ModelSpec) -> None:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    for spec, kind in ((tiny_t2v, WanPipeline), (tiny_i2v, WanImageToVideoPipeline)):
        pipeline = kind.from_pretrained(spec.path)
        assert pipeline.transformer.config.in_channels == spec.in_channels
        assert pipeline.config.boundary_ratio == spec.boundary
        assert max(pipeline.vae.config.latents_std) > 0.1  # measured, not left at the untrained 1.0
        assert pipeline.vae.config.latents_std != [1.0] * 16


def test_folder_is_made_once_in_silence_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    monkeypatch.setenv("LAPWAN_CACHE_DIR", str(tmp_path))
    logging.enable_progress_bar()
    folder = tiny_folder("t2v")
    assert capsys.readouterr().err == "" and logging.is_progress_bar_enabled()
    marker = folder / "marker"
    marker.touch()
    assert tiny_folder("t2v") == folder and marker.exists()
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_words_of_scenes_are_whole_pieces() -> None:
    tokenizer = make_tokenizer()
    for word in ("吸引管", "顺时针", "牵开", "积血", "小血管", "反复", "工具", "扫动"):
        assert word in tokenizer.tokenize(word), word
    assert tokenizer.tokenize("sweeps clockwise") == ["▁sweeps", "▁clockwise"]
    assert tokenizer.decode(tokenizer("€ 你好 hook", add_special_tokens=False).input_ids) == "€ 你好 hook"


def test_velocity_beats_knowing_nothing(tiny_t2v: ModelSpec) -> None:
    """On a fresh scene: far below the error of the constant answer 0, by both noise experts in their own bands."""
    from lapwan.losses.flow import add_noise, velocity_target
    from lapwan.tiny.scenes import SceneSpec, render
    from lapwan.wan.backbone import WanBackbone, load_transformer
    from lapwan.wan.text import encode_text, load_text_encoder, pad_text
    from lapwan.wan.vae import encode, load_vae

    scene = render(SceneSpec("hook", motion="stroke", seed=7, size=tiny_t2v.defaults.size))
    pixels = torch.from_numpy(scene.frames_THWC).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        x0 = encode(load_vae(tiny_t2v), pixels)
        text = pad_text(encode_text(load_text_encoder(tiny_t2v), [scene.caption]))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        target = velocity_target(x0, noise)
        for noise_expert, sigma in ((NoiseExpert.HIGH, 0.95), (NoiseExpert.LOW, 0.5)):
            model = WanBackbone(load_transformer(tiny_t2v, noise_expert))
            s = torch.tensor([sigma])
            error = (model.velocity(add_noise(x0, noise, s), 1000 * s, text) - target).square().mean()
            assert error < 0.4 * target.square().mean(), noise_expert
    assert np.isfinite(x0.numpy()).all() and 0.5 < x0.std() < 2.0


def test_an_image_and_a_caption_move_the_instrument(tiny_i2v: ModelSpec) -> None:
    """At the default settings the tip goes where the caption says, far more often than by standing."""
    from PIL import Image

    from lapwan.sampling.generator import Generator
    from lapwan.sampling.request import Request
    from lapwan.tiny.evaluators import evaluate_identity, locate_tip, tip_hits
    from lapwan.tiny.instruments import INSTRUMENTS
    from lapwan.tiny.scenes import SceneSpec, render

    scene = render(SceneSpec("suction", side="bottom", motion="sweep", direction="left", seed=77, size=(96, 96)))
    defaults = tiny_i2v.defaults
    video = Generator(tiny_i2v).generate(Request(
        prompt=scene.caption, num_frames=17, size=defaults.size, steps=defaults.steps, guidance=defaults.guidance,
        fps=16, image=Image.fromarray(scene.frames_THWC[0]), seed=1,
    ))
    assert INSTRUMENTS[int(evaluate_identity(video.frames).argmax())] == "suction"
    hits = tip_hits(locate_tip(video.frames), scene.tips, (96, 96)).mean()
    standing = tip_hits(np.repeat(scene.tips[:1], 17, axis=0), scene.tips, (96, 96)).mean()
    assert hits > 0.65 and hits > standing + 0.3, (hits, standing)
