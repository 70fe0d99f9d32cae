"""`from lapwan import ...`: the library under the commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapter_cases import random_lora
from PIL import Image

import lapwan as lapwan_package
from lapwan import UserError, VideoGenerator
from lapwan.lora.formats import write_lora
from lapwan.sampling.start_image import image_fingerprint
from lapwan.settings.generate import VideoSettings


def test_from_python(tmp_path, mixture_file) -> None:
    generator = VideoGenerator("tiny", moe=mixture_file)
    small = {"num_frames": 5, "size": (32, 48), "steps": 2, "guidance": 1.0}
    video = generator.generate("电凝钩切割组织", instrument_hint="hook", alpha_expert={"hook": 0.5}, **small)
    assert video.frames.dtype == np.uint8 and video.frames.shape == (5, 32, 48, 3)
    assert video.settings["instrument_hint"] == "hook" and video.facts["moe"]["mix"]["hook"] == 1.0
    path = video.save(tmp_path / "v.mp4")
    assert path.is_file()
    with pytest.raises(UserError, match="output exists"):
        video.save(path)
    with pytest.raises(UserError, match="must be 4N\\+1"):
        generator.generate("x", num_frames=6)
    picture = Image.new("RGB", (48, 32), (200, 30, 30))
    from_image = VideoGenerator("tiny").generate("x", image=picture, **small)
    assert "image" in from_image.facts and "image" not in from_image.settings


def test_strengths_of_one_may_be_said_without_a_mixture(mixture_file, capsys) -> None:
    VideoGenerator("tiny").prepare(VideoSettings(prompt="x", alpha_base=1.0, alpha_expert=1.0))
    VideoGenerator("tiny", moe=mixture_file).prepare(VideoSettings(prompt="x", alpha_base=1.0))
    assert "has no effect" not in capsys.readouterr().err
    with pytest.raises(UserError, match="--alpha-base acts on a mixture"):
        VideoGenerator("tiny").prepare(VideoSettings(prompt="x", alpha_base=0.5))


def test_the_older_name_of_an_argument_is_not_given_beside_its_name_today() -> None:
    generator = VideoGenerator("tiny")
    with pytest.raises(UserError, match="reuse is the older name of first_block_cache, and both are given"):
        generator.generate("x", reuse=0.1, first_block_cache=0.2)
    with pytest.raises(UserError, match="first_block_cache = 2"):
        generator.generate("x", reuse=2)


def test_importing_lapwan_needs_no_torch() -> None:
    code = "import sys, lapwan; assert 'VideoGenerator' in dir(lapwan); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_merging_and_inspecting_from_python(t2v, mixture_file, tmp_path, capsys) -> None:
    files = [tmp_path / f"l_{side}_noise.safetensors" for side in ("high", "low")]
    for index, file in enumerate(files):
        write_lora(file, random_lora(index))
    folder = lapwan_package.merge(tmp_path / "merged", model="tiny", loras=files, multiplier=0.5)
    small = {"num_frames": 5, "size": (32, 48), "steps": 2, "guidance": 1.0}
    merged = VideoGenerator(folder).generate("x", **small)
    beside = VideoGenerator("tiny", loras=[f"{file}:0.5" for file in files]).generate("x", **small)
    assert (merged.latents - beside.latents).abs().max() < 1e-4
    with pytest.raises(UserError, match="nothing to merge"):
        lapwan_package.merge(tmp_path / "none", model="tiny", loras=[])
    short = lapwan_package.merge(tmp_path / "short.safetensors", loras=[files[0]], rank=2)
    assert short.is_file()
    lapwan_package.merge(tmp_path / "hook.safetensors", moe=mixture_file, mix="hook")
    assert (tmp_path / "hook_high_noise.safetensors").is_file()
    with pytest.raises(UserError, match="exists"):
        lapwan_package.merge(short, loras=[files[0]])
    assert lapwan_package.merge(short, loras=[files[0]], overwrite=True) == short
    document = lapwan_package.inspect_weights(*files)
    assert set(document["experts"]) == {"high", "low"} and document["experts"]["high"]["modules"] == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "array"])
def test_pictures_of_any_kind(mode) -> None:
    grey = np.full((32, 48, 3), 90, np.uint8)
    picture = grey if mode == "array" else Image.fromarray(grey).convert(mode)
    video = VideoGenerator("tiny").generate("x", image=picture, num_frames=1, size=(32, 48), steps=1, guidance=1.0)
    shown = Image.fromarray(grey) if mode == "array" else picture.convert("RGB")
    assert video.facts["image"] == image_fingerprint(shown)


def test_an_array_that_is_no_picture_is_refused() -> None:
    with pytest.raises(UserError, match=r"image is an array int64 \[32, 48, 3\]; give a file, a PIL image, or RGB"):
        VideoGenerator("tiny").generate("x", image=np.zeros((32, 48, 3), np.int64))


def test_a_videos_last_frame_starts_the_next() -> None:
    small = {"num_frames": 1, "size": (32, 48), "steps": 1, "guidance": 1.0}
    first = VideoGenerator("tiny").generate("x", **small)
    following = VideoGenerator("tiny").generate("x", image=first.frames[-1], **small)
    assert following.facts["image"] == image_fingerprint(Image.fromarray(first.frames[-1]))


def test_the_types_are_there_for_those_who_import_lapwan() -> None:
    assert (Path(lapwan_package.__file__).parent / "py.typed").is_file()
