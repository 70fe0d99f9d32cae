"""`lapwan generate` as it is typed: what it writes, what it says, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import random_lora
from PIL import Image
from sampling_cases import frames, generate, refused

from lapwan.lora.formats import write_lora
from lapwan.models.base import Base
from lapwan.sampling.adapters import read_adapters
from lapwan.sampling.generator import Generator
from lapwan.sampling.scheduler import make_grid
from lapwan.sampling.video import read_video_metadata
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.load import load
from lapwan.settings.lora_argument import LoraArgument


def test_seeds_repeat_bitwise(lapwan, tmp_path) -> None:
    assert generate(lapwan).code == generate(lapwan, output="b").code == 0
    assert generate(lapwan, "--seed", "43", output="c").code == 0
    assert (frames(tmp_path / "a") == frames(tmp_path / "b")).all()
    assert (frames(tmp_path / "a") != frames(tmp_path / "c")).any()
    assert frames(tmp_path / "a").shape == (5, 32, 48, 3)


def test_stdout_is_the_path_and_the_file_carries_its_settings(lapwan, tmp_path) -> None:
    ran = generate(lapwan, output="out.mp4")
    assert ran.out.strip() == str(tmp_path / "out.mp4")
    said = read_video_metadata(tmp_path / "out.mp4")
    settings, facts = json.loads(said["settings"]), json.loads(said["facts"])
    assert settings["prompt"] == "电凝钩切割组织" and settings["size"] == [32, 48] and settings["flow_shift"] == 5.0
    assert settings["negative_prompt"].startswith("色调艳丽")
    again = load(GenerateSettings, options=settings)
    assert again.guidance == {"high": 1.0, "low": 1.0}
    assert set(facts["model"]) == {"high", "low"} and facts["steps"] == {"high": 2, "low": 1}


def test_an_image_makes_tiny_an_image_to_video_model(lapwan, tmp_path) -> None:
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "first.png")
    with_image = generate(lapwan, "--image", "first.png", "-v")
    assert with_image.code == 0 and "(i2v)" in with_image.err and "32x48" in with_image.err


def test_the_size_follows_the_image(lapwan, tmp_path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    ran = lapwan("generate", "--model", "tiny", "--prompt", "x", "--image", "wide.png", "-o", "a", "--dry-run")
    assert "(i2v)" in ran.err and "64x128" in ran.err  # 96·96 pixels at 1:2, on multiples of 16


def test_one_frame_as_png(lapwan, tmp_path) -> None:
    assert generate(lapwan, "--num-frames", "1", output="a.png").code == 0
    assert Image.open(tmp_path / "a.png").size == (48, 32)


def test_the_older_spellings_work(lapwan, mixture_file, tmp_path) -> None:
    ran = lapwan(
        "generate", "--model", "tiny", "--prompt", "电凝钩切割组织。吸引止血。",
        "--instrument_hint", "Hook/Electrocautery", "--alpha_base", "0.7", "--alpha_expert", "1.0",
        "--lora_moe_weights", str(mixture_file), "--video_size", "32", "48", "--num_frames", "5", "--num_steps", "2",
        "--guidance_scale", "1", "--output_path", "old.mp4",
    )
    assert ran.code == 0, ran.err
    assert ran.err.count("warning: ") == 1 and "alpha-base 0.7 has no effect" in ran.err
    assert "hook" in ran.err and "█" * 24 in ran.err
    facts = json.loads(read_video_metadata(tmp_path / "old.mp4")["facts"])
    assert facts["moe"]["mix"]["hook"] == 1.0


def test_alpha_base_without_a_base_lora_changes_nothing(lapwan, mixture_file, tmp_path) -> None:
    assert generate(lapwan, "--moe", str(mixture_file)).code == 0
    ran = generate(lapwan, "--moe", str(mixture_file), "--alpha-base", "0.2", output="b")
    assert ran.err.count("warning: ") == 1
    assert (frames(tmp_path / "a") == frames(tmp_path / "b")).all()
    several = generate(lapwan, "--moe", str(mixture_file), "--alpha-base", "0.2", "--videos", "3", "--dry-run")
    assert several.err.count("warning: ") == 1


def test_dry_run_loads_nothing_and_prints_the_resolved_settings(unloaded, tmp_path) -> None:
    ran = generate(unloaded, "--dry-run", "--moe", "missing.safetensors")
    refused(ran, "no such file: missing.safetensors")
    ran = generate(unloaded, "--dry-run")
    assert ran.code == 0 and not (tmp_path / "a").exists()
    assert "2 on the high noise expert, 1 on the low noise expert" in ran.err
    assert "boundary = 0.875\n" in ran.out
    moved = generate(unloaded, "--dry-run", "--boundary", "0.5")
    assert "3 on the high noise expert" in moved.err and "boundary = 0.5\n" in moved.out
    (tmp_path / "again.toml").write_text(ran.out, encoding="utf-8")
    again = unloaded("generate", "--config", "again.toml", "--dry-run")
    assert again.out == ran.out


@pytest.mark.parametrize(("arguments", "words"), [
    (("--num-frames", "6"), ("frames = 6: must be 4N+1", "5 and 9")),
    (("--size", "30x48"), ("size 30x48", "multiples of 16", "32x48")),
    (("--size", "480"), ("--size", "'480'", "HEIGHTxWIDTH")),
    (("--guidance", "0.5"), ("guidance 0.5", "must be 1 (none) or more")),
    (("--guidance", "high=4,lo=3"), ("'lo' is not a noise expert",)),
    (("--sigmas", "1,0.5,0.7"), ("--sigmas", "'1,0.5,0.7'", "must be decreasing numbers")),
    (("--sigmas", "1,0.5"), ("2 sigmas are given and 3 steps; leave --steps out",)),
    (("--sigmas", "1,0.7,0.5", "--flow-shift", "3"), ("leave --flow-shift out",)),
    (("--boundary", "1.5"), ("--boundary", "less than 1")),
    (("--steps", "0"), ("steps = '0'", "greater than or equal to 1")),
    (("--sampler", "ddim"), ("'ddim'", "'unipc', 'euler' or 'dpmpp'")),
    (("--instrument-hint", "hook"), ("--instrument-hint acts on a mixture; give one with --moe",)),
    (("--alpha-expert", "2"), ("--alpha-expert acts on a mixture",)),
    (("--alpha-base", "2"), ("--alpha-base acts on a mixture",)),
    (("--lora", "none.safetensors"), ("none.safetensors",)),
    (("--image", "none.png"), ("no such image: none.png",)),
    (("--device", "cuda:99"), ("cuda:99", "--device cpu")),
])
def test_bad_input_is_one_line(arguments, words, unloaded) -> None:
    refused(generate(unloaded, *arguments), *words)


def test_bad_paths(unloaded, tmp_path) -> None:
    refused(generate(unloaded, output="a.avi"), "a.avi", ".mp4")
    refused(generate(unloaded, output="a.png"), "5 frames", "a.png")
    (tmp_path / "taken.mp4").write_bytes(b"x")
    refused(generate(unloaded, output="taken.mp4"), "output exists: taken.mp4", "--overwrite")
    assert (tmp_path / "taken.mp4").read_bytes() == b"x"
    refused(generate(unloaded, model="nowhere"), "nowhere", "'tiny'")
    (tmp_path / "not.png").write_text("text")
    refused(generate(unloaded, "--image", "not.png"), "cannot read not.png as an image")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files, whoever asks")
def test_an_output_that_cannot_be_written_is_said_before_the_work(unloaded) -> None:
    refused(generate(unloaded, output="/proc/a.mp4"), "cannot write /proc/a.mp4", "choose another output")
    refused(generate(unloaded, "--videos", "2", output="/proc/many"), "cannot write /proc/many")


def test_image_and_model_must_agree(unloaded, tmp_path, i2v, t2v) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "first.png")
    refused(generate(unloaded, model=str(i2v.path)), "image-to-video model", "--image FILE")
    refused(generate(unloaded, "--image", "first.png", model=str(t2v.path)), "takes no image", "leave --image out")


def test_a_model_without_its_low_noise_expert(unloaded, tmp_path, t2v) -> None:
    folder = tmp_path / "half"
    shutil.copytree(t2v.path, folder, copy_function=shutil.copy)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(generate(unloaded, model=str(folder)), "boundary_ratio (0.875) but no transformer_2", "download")


def test_adapters_are_not_taken_for_each_other(unloaded, tmp_path, mixture_file) -> None:
    write_lora(tmp_path / "a.safetensors", random_lora(0, metadata={"lapwan.noise_expert": "high"}))
    refused(generate(unloaded, "--moe", "a.safetensors"), "not a lapwan mixture", "--lora")
    refused(generate(unloaded, "--lora", str(mixture_file)), "is a mixture", "--moe")
    refused(generate(unloaded, "--lora", "low=a.safetensors"), "high noise expert", "high=FILE")
    refused(generate(unloaded, "--moe", str(mixture_file), "--instrument-hint", "banana"), "banana", "allowed in")


def test_guidance_acts_inside_its_interval_only(lapwan, tmp_path) -> None:
    guided = ("--guidance", "4", "--negative-prompt", "模糊")
    for name, extra in (
        ("none", ()), ("all", guided), ("outside", (*guided, "--guidance-interval", "0,0.01")),
        ("early", (*guided, "--guidance-interval", "0.95,1")),
    ):
        assert generate(lapwan, *extra, output=name).code == 0
    none, everywhere, outside, early = (frames(tmp_path / n) for n in ("none", "all", "outside", "early"))
    assert (none == outside).all() and (none != everywhere).any()
    assert (early != none).any() and (early != everywhere).any()
    refused(generate(lapwan, "--guidance-interval", "0.9,0.2", output="x"), "0 <= LOW < HIGH <= 1")
    refused(generate(lapwan, "--guidance-interval", "0.9", output="x"), "LOW,HIGH")


def test_a_distilled_lora_of_four_steps_needs_no_negative_prompt(tmp_path, t2v, small) -> None:
    """Guidance 1 evaluates the model once a step, and the negative prompt is never encoded."""
    write_lora(tmp_path / "fast.safetensors", random_lora(0))
    prompts: list[str] = []

    class Listening(Generator):
        def text_features(self, prompt: str) -> torch.Tensor:
            prompts.append(prompt)
            return super().text_features(prompt)

    lora = LoraArgument(path=tmp_path / "fast.safetensors", noise_expert="both")
    base, adapters = read_adapters(Base(t2v), [lora], None)
    Listening(base, adapters).latents(small(t2v, negative_prompt="模糊", steps=4, sampler="euler"))
    assert set(prompts) == {"电凝钩切割组织"}


def test_own_sigmas_are_the_grid_and_come_back(lapwan, tmp_path, t2v) -> None:
    """SMALL asks for 3 steps; so many are listed."""
    own = make_grid(t2v, "unipc", 3)
    listed = ",".join(f"{step.sigma:.9f}" for step in own.steps)
    assert generate(lapwan, "--num-frames", "1", output="a.png").code == 0
    assert generate(lapwan, "--num-frames", "1", "--sigmas", listed, output="b.png").code == 0
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    assert np.abs(one - two).max() <= 1
    assert "flow_shift" not in json.loads(read_video_metadata(tmp_path / "b.png")["settings"])
    again = lapwan("generate", "--from", "b.png", "-o", "c.png")
    assert "identical" in again.err, again.err
