"""Many videos in one call: prompt files, seeds, grids, sheets; repeating a video; starting from one; from Python."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import random_lora, write_random_lora
from command_line import Ran, Started
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from sampling_cases import SMALL, frames, generate, refused

from lapwan.errors import UserError
from lapwan.lora.formats import write_lora
from lapwan.sampling.generator import Generator
from lapwan.sampling.jobs import make_video_jobs
from lapwan.sampling.result import read_metadata
from lapwan.sampling.start_image import clip_tensor, read_clip
from lapwan.sampling.video import read_video_metadata, write_video
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.load import load
from lapwan.wan.vae import decode, encode, load_vae, to_frames


@pytest.fixture
def prompts(tmp_path) -> Path:
    lines = [
        {"prompt": "电凝钩切割组织", "seed": 1},
        {"prompt": "剪刀剪断组织", "steps": 2, "output": "scissors.mp4"},
        {"prompt": "suction", "guidance": "high=2,low=1"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    return path


def test_a_prompts_file_makes_each_line_as_it_would_alone(lapwan, prompts, tmp_path) -> None:
    ran = lapwan("generate", "--model", "tiny", "--prompts", str(prompts), "-o", "many", *SMALL, "--sheet")
    assert ran.code == 0, ran.err
    names = [Path(line).name for line in ran.out.splitlines()]
    assert names == ["001.mp4", "scissors.mp4", "003.mp4", "sheet.png"]
    assert (tmp_path / "many" / "report.html").read_text(encoding="utf-8").count("<article") == 3
    said = [json.loads(read_video_metadata(tmp_path / "many" / n)["settings"]) for n in names[:3]]
    assert [s["seed"] for s in said] == [1, 42, 42] and [s["steps"] for s in said] == [3, 2, 3]
    assert said[2]["guidance"] == {"high": 2.0, "low": 1.0}
    alone = generate(lapwan, "--steps", "2", prompt="剪刀剪断组织", output="alone.mp4")
    assert alone.code == 0
    one, two = (json.loads(read_video_metadata(tmp_path / n)["facts"]) for n in ("alone.mp4", "many/scissors.mp4"))
    assert one["frames"] == two["frames"]


@pytest.mark.parametrize(("line", "words"), [
    ("{", ("line 2", "not valid JSON")),
    ('["x"]', ("line 2", "expected an object with a prompt")),
    ('{"seed": 1}', ("line 2", "expected an object with a prompt")),
    ('{"prompt": "x", "sed": 1}', ("line 2", "unknown key 'sed'", "'seed'")),
    ('{"prompt": "x", "reuse": 0.1, "first_block_cache": 0.2}', ("line 2", "reuse is the older name")),
    ('{"prompt": "x", "reuse": 7}', ("line 2", "first_block_cache = 7")),
    ('{"prompt": "x", "num_frames": 6}', ("line 2", "must be 4N+1")),
    ('{"prompt": "x", "size": "30"}', ("line 2", "HEIGHTxWIDTH")),
    ('{"prompt": "x", "output": "first.mp4"}', ("line 2", "is also that of", "line 1")),
    ('{"prompt": "x", "instrument_hint": "hook"}', ("line 2", "--instrument-hint acts on a mixture")),
])
def test_a_bad_line_is_named(line, words, unloaded, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "output": "first.mp4"}\n' + line + "\n")
    refused(unloaded("generate", "--model", "tiny", "--prompts", "p.jsonl", "-o", "many", *SMALL), *words)
    assert not (tmp_path / "many").exists()


def test_seeds_count_up_and_names_say_so(lapwan, tmp_path) -> None:
    ran = generate(lapwan, "--videos", "2", "--seed", "7", output="v.mp4")
    assert [Path(line).name for line in ran.out.splitlines()] == ["v_001_seed=7.mp4", "v_002_seed=8.mp4"]
    generate(lapwan, "--seed", "8", output="one.mp4")
    first, second = (
        json.loads(read_video_metadata(tmp_path / name)["facts"])["frames"] for name in ("v_002_seed=8.mp4", "one.mp4")
    )
    assert first == second


def test_a_grid_varies_one_thing_at_the_same_noise(lapwan, mixture_file, tmp_path) -> None:
    ran = generate(lapwan, "--moe", str(mixture_file), "--grid", "alpha_expert=0,1", "--sheet", output="g.mp4")
    names = [Path(line).name for line in ran.out.splitlines()]
    assert "warning" not in ran.err
    assert names == ["g_001_alpha_expert=0.mp4", "g_002_alpha_expert=1.mp4", "g_sheet.png", "g_grid.mp4"], ran.err
    page = (tmp_path / "g_report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 1 and page.count("data-bytes=") == page.count('class="over mix"') == 2
    generate(lapwan, output="base.mp4")
    base, off, on = (
        json.loads(read_video_metadata(tmp_path / name)["facts"])["frames"] for name in ("base.mp4", *names[:2])
    )
    assert base == off != on
    width, height = Image.open(tmp_path / "g_sheet.png").size
    assert width > height > 2 * 32


def test_a_grid_over_an_older_option_names_its_videos_as_before() -> None:
    options = {"model": "tiny", "prompt": "x", "output": "grid", "grid": ["reuse=0.05,0.5"]}
    jobs = make_video_jobs(load(GenerateSettings, options=options, environment={}))
    assert [job.output.name for job in jobs] == ["001_reuse=0.05.mp4", "002_reuse=0.5.mp4"]
    assert [job.settings.first_block_cache for job in jobs] == [0.05, 0.5]


def loaded(ran: Ran) -> list[str]:
    """The transformers that a command loaded."""
    return re.findall("loading the (high|low) noise expert", ran.err)


def test_a_grid_over_adapters_shares_the_loaded_model(lapwan, mixture_file, tmp_path) -> None:
    write_lora(tmp_path / "a.safetensors", random_lora(0))
    axes = ("--grid", f"moe=none;{mixture_file}", "--grid", "lora=none;both=a.safetensors:0.5")
    ran = generate(lapwan, *axes, output="g")
    assert ran.code == 0, ran.err
    assert loaded(ran) == ["high", "low"]
    facts = [json.loads(read_video_metadata(Path(line))["facts"]) for line in ran.out.splitlines()[:4]]
    assert len({f["frames"] for f in facts}) == 4
    alone = generate(lapwan, "--lora", "both=a.safetensors:0.5", "--moe", str(mixture_file), output="alone.mp4")
    assert alone.code == 0
    assert json.loads(read_video_metadata(tmp_path / "alone.mp4")["facts"])["frames"] == facts[3]["frames"]


def frames_of(path: Path) -> str:
    return json.loads(read_video_metadata(path)["facts"])["frames"]


def test_a_grid_over_strengths(lapwan, tmp_path) -> None:
    """lora.high varies the LoRAs on the high noise expert, however they are given; the low one's strength stays."""
    write_lora(tmp_path / "a.safetensors", random_lora(0))
    ran = generate(lapwan, "--lora", "both=a.safetensors:0.5", "--grid", "lora.high=0,0.5,1", "--sheet", output="g.mp4")
    names = [Path(line).name for line in ran.out.splitlines()]
    assert names == [f"g_{n:03d}_lora.high={s}.mp4" for n, s in ((1, 0), (2, "0.5"), (3, 1))] + [
        "g_sheet.png", "g_grid.mp4"], ran.err
    assert loaded(ran) == ["high", "low"] and ran.err.count("a.safetensors: 3 x LoRA") == 1
    for name, loras in ((names[0], ["low=a.safetensors:0.5"]), (names[1], ["both=a.safetensors:0.5"]),
                        (names[2], ["high=a.safetensors", "low=a.safetensors:0.5"])):
        alone = generate(lapwan, *(word for lora in loras for word in ("--lora", lora)), "--overwrite", output="a.mp4")
        assert alone.code == 0
        assert frames_of(tmp_path / "a.mp4") == frames_of(tmp_path / name), name
    assert generate(lapwan, "--from", names[2], prompt="电凝钩切割组织", output="again.mp4").code == 0
    assert frames_of(tmp_path / "again.mp4") == frames_of(tmp_path / names[2])


def test_grids_over_strengths_of_files_that_record_their_noise_expert(tmp_path) -> None:
    files = [path.partition("=")[2] for path in write_random_lora(tmp_path)]
    options = {"model": "tiny", "prompt": "x", "output": "g", "lora": [files[0], f"{files[1]}:0.7@ffn"]}

    def strengths(grid: str) -> list[tuple[float, ...]]:
        settings = load(GenerateSettings, options={**options, "grid": [grid]}, environment={})
        return [tuple(lora.strength for lora in job.model.lora) for job in make_video_jobs(settings)]

    assert strengths("lora.low=0,1") == [(1.0, 0.0), (1.0, 1.0)]
    assert strengths("lora.high=-1") == [(-1.0, 0.7)]
    assert strengths("lora.both=0.3,0.4") == [(0.3, 0.3), (0.4, 0.4)]
    options["lora"] = files[:1]
    with pytest.raises(UserError, match="--lora gives none for it"):
        strengths("lora.low=0,1")


def test_parts_of_a_lora_are_the_lora_of_these_modules(lapwan, tmp_path) -> None:
    whole = random_lora(0)
    write_lora(tmp_path / "a.safetensors", whole)
    whole.entries = {path: entry for path, entry in whole.entries.items() if path.startswith("blocks.7.attn2")}
    write_lora(tmp_path / "part.safetensors", whole)
    for lora, output in (("a.safetensors:0.8@blocks.5-7@cross_attn", "a.mp4"), ("part.safetensors:0.8", "part.mp4")):
        assert generate(lapwan, "--lora", f"both={lora}", output=output).code == 0
    assert frames_of(tmp_path / "a.mp4") == frames_of(tmp_path / "part.mp4")
    assert generate(lapwan, "--from", "a.mp4", prompt="电凝钩切割组织", output="again.mp4").code == 0
    assert frames_of(tmp_path / "again.mp4") == frames_of(tmp_path / "a.mp4")


@pytest.mark.parametrize(("name", "opened"), [("a.webp", 5), ("a.gif", 5), ("a.safetensors", 0)])
def test_other_outputs_carry_their_settings_too(name, opened, lapwan, tmp_path) -> None:
    assert generate(lapwan, output=name).code == 0
    said = read_metadata(tmp_path / name)
    facts = json.loads(said["facts"])
    if opened:
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == opened and image.size == (48, 32)
            total = 0
            for index in range(opened):
                image.seek(index)
                image.load()
                total += image.info["duration"]
            assert total == pytest.approx(5 * 1000 / 16, abs=10)
    else:
        latents = load_file(tmp_path / name)["latents"]
        assert latents.shape == (1, 16, 2, 4, 6)
    again = lapwan("generate", "--from", name, "-o", "again.mp4")
    assert "identical to those of" in again.err
    assert json.loads(read_metadata(tmp_path / "again.mp4")["facts"])["frames"] == facts["frames"]


def test_a_preview_is_there_after_every_step_and_changes_nothing(lapwan, t2v, small, tmp_path) -> None:
    sizes = []

    class Watched(Generator):
        def _write_preview(self, path: Path, x0_BCTHW: torch.Tensor) -> None:
            super()._write_preview(path, x0_BCTHW)
            with Image.open(path) as image:
                sizes.append(image.size)

    Watched(t2v).generate(small(t2v), tmp_path / "preview.png")
    assert len(sizes) == 3 and sizes[0][0] > 2 * 48  # two latent frames side by side
    assert generate(lapwan, "--preview", output="a").code == 0
    assert generate(lapwan, output="b").code == 0
    assert (tmp_path / "a_preview.png").is_file()
    assert (frames(tmp_path / "a") == frames(tmp_path / "b")).all()


def test_crf_is_the_quality_of_an_mp4(lapwan, tmp_path) -> None:
    assert generate(lapwan, "--crf", "0", output="fine.mp4").code == 0
    assert generate(lapwan, output="own.mp4").code == 0
    assert generate(lapwan, "--crf", "45", output="coarse.mp4").code == 0
    fine, own, coarse = ((tmp_path / f"{name}.mp4").stat().st_size for name in ("fine", "own", "coarse"))
    assert fine > 1.2 * own > 1.2 * coarse
    for other in ("a.gif", "frames"):
        refused(generate(lapwan, "--crf", "10", output=other), "--crf is the quality of an .mp4")


@pytest.mark.parametrize(("text", "words"), [
    ("alpha_expert", ("expected OPTION=A,B",)),
    ("alpha=1", ("'alpha' cannot be compared", "alpha_base")),
    ("steps=1,x", ("--grid", "steps = 'x'")), ("lora.high=0,x", ("strengths must be numbers",)),
    ("lora.high=0,1", ("needs a LoRA",)), ("lora.hihg=0,1", ("did you mean 'lora.high'",)),
    ("lora=0,0.5,1", ("for strengths write lora.high=0,0.5,1",)),
])
def test_bad_grids(text, words, unloaded) -> None:
    refused(generate(unloaded, "--grid", text), *words)
    refused(generate(unloaded, "--grid", "seed=1,2", "--grid", "seed=3"), "--grid varies 'seed' twice")
    refused(generate(unloaded, "--grid", "seed=1,2", "--videos", "2"), "both count seeds")


def test_from_repeats_bitwise_or_says_what_changed(lapwan, mixture_file, tmp_path) -> None:
    lora = tmp_path / "a.safetensors"
    write_lora(lora, random_lora(0))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "first.png")
    made = generate(lapwan, "--lora", "both=a.safetensors:0.5", "--image", "first.png", "--seed", "9", output="a.mp4")
    assert made.code == 0, made.err
    (tmp_path / "elsewhere").mkdir()
    again = lapwan("generate", "--from", str(tmp_path / "a.mp4"), "-o", "elsewhere/b.mp4")
    assert again.code == 0 and "identical to those of" in again.err, again.err
    assert (tmp_path / "a.mp4").stat().st_size == (tmp_path / "elsewhere/b.mp4").stat().st_size
    one, two = (json.loads(read_video_metadata(tmp_path / n)["facts"]) for n in ("a.mp4", "elsewhere/b.mp4"))
    assert one == two

    other = lapwan("generate", "--from", "a.mp4", "--seed", "10", "-o", "c.mp4")
    assert "the frames differ from a.mp4; options given: seed" in other.err
    write_lora(lora, random_lora(5))
    changed = lapwan("generate", "--from", "a.mp4", "-o", "d.mp4")
    assert changed.code == 0 and "warning: the LoRAs have changed" in changed.err
    lora.unlink()
    refused(lapwan("generate", "--from", "a.mp4", "-o", "e.mp4"), "a.safetensors")


def test_from_needs_a_video_of_ours(lapwan, tmp_path) -> None:
    write_video(tmp_path / "plain.mp4", np.zeros((5, 32, 32, 3), np.uint8), 16)
    refused(lapwan("generate", "--from", "plain.mp4", "-o", "b.mp4"), "plain.mp4 holds no settings")
    refused(lapwan("generate", "--from", "none.mp4", "-o", "b.mp4"), "no such video: none.mp4")


def test_what_is_missing_is_asked_for(lapwan) -> None:
    refused(lapwan("generate", "--model", "tiny", "-o", "a"), "give --prompt TEXT")
    refused(lapwan("generate", "--model", "tiny", "--prompt", "x"), "--output is required")
    refused(lapwan("generate", "--prompt", "x", "-o", "a"), "--model is required")
    refused(generate(lapwan, "--prompts", "p"), "--prompt and --prompts are both given")


def test_interrupting_leaves_finished_videos_whole(tmp_path) -> None:
    started = Started("generate", "--model", "tiny", "--prompt", "x", "--videos", "3", "-o", "v.mp4", *SMALL,
                      "--steps", "60", cwd=tmp_path)
    while "video 2 of 3" not in started.written()[1] and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    ran = started.wait()
    assert ran.code == 130 and "interrupted after 1 of 3 videos; complete: v_001_seed=42.mp4" in ran.err
    assert [p.name for p in tmp_path.glob("*.mp4")] == ["v_001_seed=42.mp4"]
    assert not list(tmp_path.glob(".lapwan-tmp*"))


def test_starting_from_a_video(lapwan, t2v, tmp_path) -> None:
    """Little noise stays near what the VAE makes of it; more noise goes farther; too short is refused."""
    clip = np.zeros((9, 32, 48, 3), np.uint8)
    clip[:, :, :24] = 220
    write_video(tmp_path / "in.mp4", clip, 16)
    for name, sigma in (("near", "0.7"), ("far", "0.95")):
        ran = generate(lapwan, "--video", "in.mp4", "--start-sigma", sigma, "--steps", "12", output=name)
        assert ran.code == 0, ran.err
        assert 0 < float(ran.err.split("from sigma ")[1][:6]) <= float(sigma)
    spec_steps = json.loads(read_video_metadata(tmp_path / "near")["facts"])["steps"]
    assert spec_steps["high"] == 0 and 0 < spec_steps["low"] < 12
    vae = load_vae(t2v)
    seen = to_frames(decode(vae, encode(vae, clip_tensor(read_clip(tmp_path / "in.mp4", 5, (32, 48), 16)))))
    near, far = (np.abs(frames(tmp_path / name).astype(float) - seen).mean() for name in ("near", "far"))
    assert near < far
    refused(generate(lapwan, "--video", "in.mp4", "--num-frames", "13", output="long"), "in.mp4 has 9 frames")
    refused(generate(lapwan, "--start-sigma", "0.5", output="none"), "give one with --video")


def test_first_and_last_frame_equal_diffusers(i2v, small) -> None:
    rng = np.random.default_rng(1)
    first, last = (Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)) for _ in range(2))
    pipeline = WanImageToVideoPipeline.from_pretrained(i2v.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    request = small(i2v, image=first, last_image=last, num_frames=9)
    expected = pipeline(
        image=first, last_image=last, prompt=request.prompt, height=32, width=48, num_frames=9, num_inference_steps=3,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(request.seed), output_type="latent",
    ).frames
    assert (Generator(i2v).latents(request) - expected).abs().max() < 1e-4


def test_chinese_on_an_output_that_cannot_hold_it(lapwan) -> None:
    ran = lapwan("generate", "--model", "tiny", "--prompt", "电凝钩", "-o", "a.mp4", "--dry-run", encoding="ascii")
    assert ran.code == 0 and 'prompt = "\\u7535\\u51dd\\u94a9"' in ran.out, ran.err


def test_interactive_keeps_the_model_and_survives_a_bad_line(lapwan, tmp_path) -> None:
    lines = [
        "电凝钩切割组织", '{"prompt": "x", "num_frames": 6}', '{"prompt": "suction", "seed": 5, "output": "s.mp4"}',
        '{"prompt": "again", "output": "s.mp4"}', "",
    ]
    ran = lapwan("generate", "--model", "tiny", "--interactive", "-o", "chat", *SMALL,
                 stdin="\n".join(lines) + "\n")
    assert ran.code == 0, ran.err
    assert [Path(line).name for line in ran.out.splitlines()] == ["001.mp4", "s.mp4"]
    assert "skipped: frames = 6: must be 4N+1" in ran.err and loaded(ran) == ["high", "low"]
    assert "skipped: output exists: chat/s.mp4" in ran.err
    assert json.loads(read_video_metadata(tmp_path / "chat/s.mp4")["settings"])["seed"] == 5
    refused(generate(lapwan, "--interactive"), "leave --prompt")
    dry = lapwan("generate", "--model", "tiny", "--interactive", "-o", "dry", "--dry-run")
    assert dry.code == 0 and "interactive = true" in dry.out and not (tmp_path / "dry").exists()
    refused(lapwan("generate", "--model", "tiny", "--interactive", "-o", "a.mp4"), "give it as --output DIR")


def test_one_frame_of_many_is_an_image(lapwan) -> None:
    still = ("--num-frames", "1", "--size", "32x48", "--steps", "1", "--guidance", "1")
    ran = lapwan("generate", "--model", "tiny", "--prompt", "x", "--videos", "2", "-o", "stills", *still)
    assert [Path(line).name for line in ran.out.splitlines()] == ["001_seed=42.png", "002_seed=43.png"], ran.err
    ran = lapwan("generate", "--model", "tiny", "--interactive", "-o", "chat", *still,
                 stdin='x\n{"prompt": "x", "num_frames": 5}\n')
    assert [Path(line).name for line in ran.out.splitlines()] == ["001.png", "002.mp4"], ran.err


def test_interactive_makes_several_videos_of_a_line_with_previews(lapwan, tmp_path) -> None:
    ran = lapwan("generate", "--model", "tiny", "--interactive", "-o", "chat", "--videos", "2", "--preview", *SMALL,
                 stdin='hook\n{"prompt": "x", "seed": 5, "output": "x.gif"}\n')
    assert ran.code == 0, ran.err
    names = ["001.mp4", "002.mp4", "x_seed=5.gif", "x_seed=6.gif"]
    assert [Path(line).name for line in ran.out.splitlines()] == names
    seeds = [json.loads(read_video_metadata(tmp_path / "chat" / name)["settings"])["seed"] for name in names]
    assert seeds == [42, 43, 5, 6] and (tmp_path / "chat/preview.png").is_file()
    refused(lapwan("generate", "--model", "tiny", "--interactive", "-o", "chat", "--sheet"), "leave it out")


def test_the_example_of_a_prompts_file(lapwan) -> None:
    file = Path(__file__).parents[2] / "examples/prompts.jsonl"
    ran = lapwan("generate", "--model", "tiny", "--prompts", str(file), "-o", "videos", "--dry-run")
    assert ran.code == 0 and "4 videos" in ran.err


def test_what_rounds_is_recorded_and_said_when_it_changes(lapwan, tmp_path) -> None:
    """A picture of other bits says what was otherwise: here its record is given other facts."""
    made = generate(lapwan, "--guidance", "3", "--dtype", "int8", "--num-frames", "1", output="a.png")
    assert made.code == 0, made.err
    stored = read_video_metadata(tmp_path / "a.png")
    facts = json.loads(stored["facts"])
    assert facts["precision"] == "int8" and facts["guidance"] == "one batch" and facts["compiled"] == []
    assert facts["hardware"].endswith("1 thread") and json.loads(stored["settings"])["compile"] == "auto"

    facts |= {"frames": "0", "compiled": ["low"], "guidance": "two passes", "hardware": "a slide rule"}
    facts["model"] = {**facts["model"], "low": "f" * 64}
    facts["lora"] = [{"noise_expert": "high", "file": "x.safetensors", "strength": 0.5, "fingerprint": "e" * 64}]
    del facts["precision"]
    write_video(tmp_path / "b.png", np.zeros((1, 32, 48, 3), np.uint8), 16, {**stored, "facts": json.dumps(facts)})
    again = lapwan("generate", "--from", "b.png", "-o", "c.png")
    low = json.loads(stored["facts"])["model"]["low"]
    for words in (
        f"the transformers have changed (low: ffffffffffff... -> {low[:12]}...)",
        "the LoRAs have changed (high x.safetensors 0.5 eeeeeeeeeeee... -> none)",
        "the machine has changed (a slide rule -> ", "the quantisation has changed (none -> int8)",
        "what is compiled has changed (low -> none)", "the batching of guidance has changed (two passes -> one batch)",
    ):
        assert f"warning: {words}" in again.err, again.err
    older = {name: value for name, value in facts.items() if name not in ("hardware", "compiled", "guidance")}
    write_video(tmp_path / "d.png", np.zeros((1, 32, 48, 3), np.uint8), 16, {**stored, "facts": json.dumps(older)})
    assert "machine has changed" not in lapwan("generate", "--from", "d.png", "-o", "e.png").err
