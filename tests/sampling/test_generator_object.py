"""`VideoGenerator` as an object: threads, callbacks, batches, closing, inputs of other libraries, types, notebooks."""

from __future__ import annotations

import base64
import importlib.resources
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from adapter_cases import random_lora
from PIL import Image

from lapwan import Interrupted, UserError, VideoGenerator
from lapwan.api import _lora_options
from lapwan.lora.formats import write_lora
from lapwan.sampling.result import read_metadata
from lapwan.sampling.start_image import as_rgb_image
from lapwan.settings.lora_argument import LoraArgument

SMALL = {"num_frames": 5, "size": (32, 48), "steps": 3, "guidance": 2.0}


@pytest.fixture(scope="module")
def generator():
    with VideoGenerator("tiny") as made:
        yield made


def test_two_threads_give_the_videos_of_one_after_the_other(mixture_file):
    prompts = [("电凝钩切割组织", "hook"), ("剪刀剪断组织", "scissors"), ("吸引器吸引", "suction")]
    with VideoGenerator("tiny", moe=mixture_file) as generator:
        alone = [generator.generate(prompt, instrument_hint=hint, **SMALL) for prompt, hint in prompts]
    with VideoGenerator("tiny", moe=mixture_file) as generator:
        together = dict[int, np.ndarray]()
        barrier = threading.Barrier(len(prompts))

        def work(index: int) -> None:
            barrier.wait()
            prompt, hint = prompts[index]
            together[index] = generator.generate(prompt, instrument_hint=hint, **SMALL).frames

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, video in enumerate(alone):
        assert (together[index] == video.frames).all()
    assert (alone[0].frames != alone[1].frames).any()


def test_two_objects_in_two_threads_load_and_sample_one_after_the_other(generator):
    """diffusers builds a model on the meta device for the whole process: two at once would crash."""
    expected = generator.generate("x", **SMALL).frames
    frames = []
    threads = [threading.Thread(target=lambda: frames.append(VideoGenerator("tiny").generate("x", **SMALL).frames))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(frames) == 2 and all((made == expected).all() for made in frames)


def test_the_callback_counts_and_cancels(generator):
    seen = []
    whole = generator.generate("x", **SMALL, on_step=lambda step, total: seen.append((step, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(Interrupted, match="cancelled by on_step after 2 of 3 steps"):
        generator.generate("x", **SMALL, on_step=lambda step, total: step < 2)
    assert (generator.generate("x", **SMALL).frames == whole.frames).all()


def test_from_a_callback_the_object_is_busy(generator):
    for inside in (lambda: generator.generate("y", **SMALL), generator.close):
        with pytest.raises(UserError, match="from on_step"):
            generator.generate("x", **SMALL, on_step=lambda step, total, inside=inside: inside())
    generator.generate("x", **SMALL)


def test_many_videos_are_those_of_one_at_a_time(generator, tmp_path):
    prompts, seeds = ["电凝钩切割组织", "剪刀剪断组织", "抓钳抓取"], [1, 2, 3]
    alone = [generator.generate(prompt, seed=seed, **SMALL) for prompt, seed in zip(prompts, seeds, strict=True)]
    one_by_one = generator.generate_many(prompts, seeds=seeds, **SMALL)
    for single, video in zip(alone, one_by_one, strict=True):
        assert (single.frames == video.frames).all() and single.settings == video.settings
    counts = []
    batched = generator.generate_many(prompts, seeds=seeds, batch_size=2, **SMALL,
                                      on_step=lambda step, total: counts.append((step, total)))
    assert counts == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]
    for single, video in zip(alone, batched, strict=True):
        assert (single.latents - video.latents).abs().max() < 1e-4 and video.latents.shape == single.latents.shape
    assert [video.facts.get("batch") for video in batched] == [2, 2, None]
    assert read_metadata(batched[0].save(tmp_path / "a.mp4"))["settings"] == batched[0].metadata()["settings"]
    assert [video.settings["seed"] for video in generator.generate_many("x", seeds=[4, 5], **SMALL)] == [4, 5]
    with pytest.raises(UserError, match="2 prompts, 3 seeds, batch_size = 1"):
        generator.generate_many(["a", "b"], seeds=[1, 2, 3])
    with pytest.raises(UserError, match="must be 4N"):
        generator.generate_many(["a", "b"], num_frames=6)


def test_closing_frees_and_ends():
    with VideoGenerator("tiny") as generator:
        generator.generate("x", **SMALL)
        assert generator._generators
    assert not generator._generators and not generator._bases and not generator._adapters
    generator.close()
    with pytest.raises(UserError, match="this VideoGenerator is closed; make a new one"):
        generator.generate("x", **SMALL)


def test_images_of_every_library_are_the_same_picture():
    array = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    channels_first = torch.from_numpy(array).permute(2, 0, 1)
    for image in (Image.fromarray(array), array, array.astype(np.float64) / 255, channels_first,
                  channels_first.float() / 255, channels_first[None].double() / 255, torch.from_numpy(array)):
        assert (np.array(as_rgb_image(image, "image")) == array).all()
    with pytest.raises(UserError, match=r"values from -1 to 1; floats must be in \[0, 1\]"):
        as_rgb_image(np.linspace(-1, 1, 32 * 48 * 3).reshape(32, 48, 3), "image")
    for wrong in (array[..., 0], array.astype(np.int64), torch.zeros(2, 3, 32, 48), np.full((8, 8, 3), np.nan)):
        with pytest.raises(UserError, match="image is an array"):
            as_rgb_image(wrong, "image")


def test_devices_and_dtypes_of_torch():
    generator = VideoGenerator("tiny", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (generator.settings.device, generator.settings.dtype) == ("cpu", "bf16")
    with pytest.raises(UserError, match=r"dtype = torch\.float64: allowed are torch\.float32"):
        VideoGenerator("tiny", dtype=torch.float64)
    with pytest.raises(UserError, match="must be auto, cpu, cuda or cuda:N"):
        VideoGenerator("tiny", device=torch.device("meta"))


def test_loras_in_every_form(tmp_path):
    file = tmp_path / "l_high_noise.safetensors"
    write_lora(file, random_lora(0))
    forms = [f"{file}:0.5", (file, 0.5), [(str(file), 0.5)], [LoraArgument(path=file, strength=0.5)]]
    videos = [VideoGenerator("tiny", loras=form).generate("x", **SMALL) for form in forms]
    assert all((video.frames == videos[0].frames).all() for video in videos)
    assert _lora_options(file) == [{"path": str(file)}] and _lora_options([str(file), (file, 2)]) == [
        str(file), {"path": str(file), "strength": 2}]


def test_a_video_shows_itself_in_a_notebook(generator):
    video = generator.generate("x", **SMALL)
    assert repr(video) == "Video(5 frames of 32x48 at 16 fps, seed 42)"
    html = video._repr_html_()
    start = '<video controls loop autoplay muted src="data:video/mp4;base64,'
    assert html.startswith(start) and b"ftyp" in base64.b64decode(html.removeprefix(start).split('"')[0])[:16]
    assert generator.generate("x", **{**SMALL, "num_frames": 1})._repr_html_().startswith('<img src="data:image/png')


SCRIPT = """
from pathlib import Path

import numpy as np
import torch

from lapwan import Interrupted, UserError, Video, VideoGenerator


def show(step: int, total: int) -> bool | None:
    print(step, total)
    return step < 20


def make(folder: Path) -> list[Video]:
    with VideoGenerator(folder, moe="m.safetensors", loras=[("a.safetensors", 0.8), "high=b.safetensors"],
                        device=torch.device("cuda"), dtype=torch.bfloat16, memory=16.0) as generator:
        try:
            video = generator.generate("x", image=np.zeros((8, 8, 3), np.uint8), guidance={"high": 4.0, "low": 3.0},
                                       size=(480, 832), on_step=show)
        except (Interrupted, UserError) as error:
            print(error)
            return []
        path: Path = video.save("out.mp4")
        print(path, video.frames.shape, video.fps)
        return generator.generate_many(["a", "b"], seeds=[1, 2], batch_size=2, steps=20, image=torch.zeros(3, 8, 8))
"""
WRONG = 'from lapwan import VideoGenerator\nVideoGenerator("tiny", memory="most").generate(3, steps="many")\n'


def test_a_users_script_passes_mypy(tmp_path):
    """Only its own lines are judged; torch is skipped, whose types take half a minute."""
    (tmp_path / "right.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    skipped = "".join(f"[mypy-{name}.*]\nignore_missing_imports = True\nfollow_imports = skip\n"
                      for name in ("torch", "diffusers", "transformers", "PIL", "av", "accelerate", "jieba", "ftfy"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-lapwan.*]\nignore_errors = True\n{skipped}", encoding="utf-8")

    def check(name: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "--allow-untyped-calls", name],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False).stdout

    assert "Success" in (out := check("right.py")), out
    assert check("wrong.py").count("[arg-type]") == 3


def test_the_types_are_shipped():
    assert importlib.resources.files("lapwan").joinpath("py.typed").is_file()
