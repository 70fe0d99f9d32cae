"""What commands do with weights in other containers and layouts: the folder's numbers, or one line at --dry-run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_cases import random_lora
from cache_clips import make_video, write_jsonl
from command_line import Ran
from diffusers import AutoencoderKLWan
from layout_cases import BROKEN, HIGH, LOW, Tensors, files_of, original, stored, with_config, write_q8, write_scaled
from safetensors.torch import load_file, save_file

from lapwan.checkpoints.container import read_header
from lapwan.errors import UserError
from lapwan.lora.formats import write_lora
from lapwan.lora.kinds import DoRA, FullDelta
from lapwan.lora.state import AdapterState, LowRank
from lapwan.models.base import resolve_base
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import NoiseExpert
from lapwan.settings.model import ModelFilesSettings
from lapwan.wan.text import load_text_encoder

STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SAMPLING = ("--prompt", "a hook", "--num-frames", "5", "--size", "32x48", "--steps", "2", "--guidance", "1")


def save_pickle(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path)


def save_old_pickle(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_nested(tensors: Tensors, path: Path) -> None:
    torch.save({"step": 3, "state_dict": {f"module.{name}": value for name, value in tensors.items()}}, path)


def save_mixed(tensors: Tensors, path: Path) -> None:
    prefixes = "model.diffusion_model.", "diffusion_model.", "", "ema.model."
    save_file({prefixes[i % 4] + name: value for i, (name, value) in enumerate(tensors.items())}, path)


CONTAINERS = {
    ".sft": save_file, ".pth": save_pickle, ".pt": save_old_pickle, ".bin": save_nested, ".ckpt": save_file,
    ".safetensors": save_mixed,
}


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_what_is_in_a_file_decides_how_it_is_read(suffix, own_cache, tiny_t2v, tmp_path) -> None:
    with_config(tiny_t2v, tmp_path)
    paths = {e: tmp_path / f"{e.value}{suffix}" for e in NoiseExpert}
    for noise_expert, path in paths.items():
        CONTAINERS[suffix]({original(n): v for n, v in stored(tiny_t2v, noise_expert).items()}, path)
    base = resolve_base(files_of(tiny_t2v, high=paths[HIGH], low=paths[LOW]))
    for name, parameter in base.load(LOW).transformer.named_parameters():
        assert torch.equal(parameter, stored(tiny_t2v, LOW)[name]), name
    assert base.fingerprint(LOW) == tiny_t2v.fingerprint(LOW)


def in_shards(spec: ModelSpec, folder: Path, stem: str, count: int = 3) -> list[Path]:
    with_config(spec, folder)
    names = sorted(stored(spec, HIGH))
    paths = [folder / f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for n, path in enumerate(paths):
        save_file({name: stored(spec, HIGH)[name] for name in names[n::count]}, path)
    return paths


def test_shards_with_and_without_an_index(own_cache, tiny_t2v, tmp_path) -> None:
    paths = in_shards(tiny_t2v, tmp_path / "shards", "model")
    low = tiny_t2v.component(LOW)
    files = files_of(tiny_t2v, high=paths[0].parent, low=low)
    assert resolve_base(files).fingerprint(HIGH) == tiny_t2v.fingerprint(HIGH)
    with pytest.raises(UserError, match=r"is one of 3 shards; give their folder: .*shards$"):
        resolve_base(files_of(tiny_t2v, high=paths[1], low=low))
    paths[1].unlink()
    with pytest.raises(UserError, match="lacks shards 2 of 3"):
        resolve_base(files)


def changed(change: Callable[[Tensors], None]) -> Callable[[ModelSpec, Path], dict[str, Path]]:
    def write(spec: ModelSpec, folder: Path) -> dict[str, Path]:
        tensors = {f"model.diffusion_model.{original(n)}": v for n, v in stored(spec, HIGH).items()}
        change(tensors)
        save_file(tensors, with_config(spec, folder) / "a.safetensors")
        return {"high": folder / "a.safetensors"}
    return write


def both_in_one_folder(spec: ModelSpec, folder: Path) -> dict[str, Path]:
    for noise_expert in NoiseExpert:
        save_file(stored(spec, noise_expert), with_config(spec, folder) / f"wan_{noise_expert.value}.safetensors")
    return {"high": folder, "low": folder}


def tokenizer_with(name: str, content: bytes | None) -> Callable[[ModelSpec, Path], dict[str, Path]]:
    def write(spec: ModelSpec, folder: Path) -> dict[str, Path]:
        shutil.copytree(spec.path / "tokenizer", folder / "tokenizer")
        (folder / "tokenizer" / name).unlink()
        if content is not None:
            (folder / "tokenizer" / name).write_bytes(content)
        return {"tokenizer": folder / "tokenizer"}
    return write


def broken(part: str, name: str, content: bytes) -> Callable[[ModelSpec, Path], dict[str, Path]]:
    def write(spec: ModelSpec, folder: Path) -> dict[str, Path]:
        (folder / name).write_bytes(content)
        return {part: folder / name}
    return write


def component_with(part: str, change: Callable[[Tensors], object]) -> Callable[[ModelSpec, Path], dict[str, Path]]:
    def write(spec: ModelSpec, folder: Path) -> dict[str, Path]:
        tensors = load_file(weights_of(spec, part))
        change(tensors)
        torch.save(tensors, folder / "a.pth")
        return {part: folder / "a.pth"}
    return write


def vae_without(name: str) -> Callable[[ModelSpec, Path], dict[str, Path]]:
    def write(spec: ModelSpec, folder: Path) -> dict[str, Path]:
        tensors = AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1).state_dict()
        save_file({n: v for n, v in tensors.items() if n != name}, folder / "a.safetensors")
        return {"vae": folder / "a.safetensors"}
    return write


def weights_of(spec: ModelSpec, part: str) -> Path:
    return weight_files(spec.path / part)[0]


REFUSED = {
    "all in one": (changed(lambda t: t.update({"vae.conv2.weight": torch.ones(2), "text_encoders.a.b": torch.ones(2)})),
                   "all-in-one checkpoint"),
    "one weight twice": (changed(lambda t: t.update({"blocks.0.ffn.0.bias": torch.ones(768)})),
                         "the same weight twice"),
    "both in one folder": (both_in_one_folder, "wan_high.safetensors and .*wan_low.safetensors both hold"),
    "VAE as transformer": (lambda spec, _: {"high": weights_of(spec, "vae")}, "not a Wan transformer but Wan's VAE"),
    "umT5 as transformer": (lambda spec, _: {"low": weights_of(spec, "text_encoder")}, "but a umT5 encoder"),
    "transformer as VAE": (lambda spec, _: {"vae": weights_of(spec, "transformer")}, "Wan's VAE but a Wan transformer"),
    "transformer as umT5": (lambda spec, _: {"text_encoder": weights_of(spec, "transformer")}, "but a Wan transformer"),
    "VAE that lacks a tensor": (vae_without("decoder.conv_out.bias"),
                                "lacks 1 tensors of Wan2.1's VAE, such as 'decoder.conv_out.bias'"),
    "VAE of other widths": (component_with("vae", lambda t: None), r"'decoder\.conv_in\.bias' has shape \[64\]"),
    "whole T5": (component_with("text_encoder", lambda t: t.update({"decoder.x": torch.ones(2)})),
                 "'decoder.x' does not belong to a umT5 encoder"),
    "folder of another component": (lambda spec, _: {"vae": spec.path / "text_encoder"},
                                    "is the folder of UMT5EncoderModel; give that of the VAE"),
    "exchanged folders": (lambda spec, _: {"high": spec.component(LOW), "low": spec.component(HIGH)},
                          "wrong way round"),
    "no tokenizer": (lambda spec, folder: {"tokenizer": folder / "none"}, "no such folder"),
    "tokenizer's vocabulary": (tokenizer_with("tokenizer.json", None), "neither tokenizer.json nor spiece.model"),
    "tokenizer is a pointer": (tokenizer_with("tokenizer.json", BROKEN["Git LFS pointer"]), "it is a Git LFS pointer"),
    "tokenizer's config": (tokenizer_with("tokenizer_config.json", BROKEN["HTML page"]), "it is an HTML page"),
    "cut torch.save": (broken("vae", "a.pth", b"PK\x03\x04" + b"\0" * 60), "truncated"),
    "text as .pth": (broken("vae", "a.pth", b"hello world"), "neither a safetensors, a GGUF nor a torch.save file"),
    "torch.save as .safetensors": (broken("text_encoder", "a.safetensors", b"PK\x03\x04" + b"\0" * 60),
                                   "if torch.save wrote it, it is a .pth"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_kind(kind, own_cache, tiny_t2v, tmp_path) -> None:
    make, message = REFUSED[kind]
    (tmp_path / "x").mkdir()
    given = {"high": tiny_t2v.component(HIGH), "low": tiny_t2v.component(LOW), **make(tiny_t2v, tmp_path / "x")}
    with pytest.raises(UserError, match=message):
        resolve_base(files_of(tiny_t2v, **given))


@pytest.mark.parametrize(("part", "name"), [
    ("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors"),
    ("tokenizer", "tokenizer.json")])
@pytest.mark.parametrize("kind", ["Git LFS pointer", "HTML page", "empty file"])
def test_failed_downloads_in_a_model_folder_at_dry_run(part, name, kind, lapwan, tiny_t2v, tmp_path) -> None:
    shutil.copytree(tiny_t2v.path, tmp_path / "m")
    (tmp_path / "m" / part / name).write_bytes(BROKEN[kind])
    ran: Ran = lapwan("generate", "--model", "m", *SAMPLING, "-o", "a.mp4", "--dry-run")
    assert ran.code == 2 and kind in ran.err and len(ran.err.strip().splitlines()) == 1


def test_components_as_folders_of_shards_and_as_fp8_pickles(own_cache, tiny_t2v, tmp_path) -> None:
    """Shards without the index that `from_pretrained` needs; plain fp8 in a .pth."""
    file = weights_of(tiny_t2v, "text_encoder")
    tensors = load_file(file)
    (tmp_path / "te").mkdir()
    shutil.copy(file.parent / "config.json", tmp_path / "te")
    for n in (1, 2):
        save_file(dict(list(tensors.items())[n - 1 :: 2]), tmp_path / "te" / f"model-0000{n}-of-00002.safetensors")
    fp8 = {n: v.to(torch.float8_e4m3fn) if "DenseReluDense" in n else v for n, v in tensors.items()}
    torch.save(fp8, tmp_path / "te.pth")
    for path, wanted in ((tmp_path / "te", tensors), (tmp_path / "te.pth", fp8)):
        files = files_of(tiny_t2v, high=tiny_t2v.component(HIGH), low=tiny_t2v.component(LOW), text_encoder=path)
        for name, parameter in load_text_encoder(resolve_base(files).spec).model.named_parameters():
            assert torch.equal(parameter, wanted[name.replace("encoder.embed_tokens", "shared")].float()), name


def config_file(path: Path, files: ModelFilesSettings, **more: str) -> Path:
    table = files.model_dump(mode="json", exclude_none=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    path.write_text("\n".join([*lines, "[model]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]))
    return path


@pytest.fixture
def quantised(own_cache, tiny_t2v, tmp_path) -> dict[str, Path]:
    """The embedded model with its transformers in fp8 with scales and in GGUF, as files and as model folders; for each
    also a folder with the dequantised weights."""
    made: dict[str, Path] = {}
    for kind, write, suffix in (("fp8", write_scaled, ".safetensors"), ("gguf", write_q8, ".gguf")):
        folder = tmp_path / kind
        with_config(tiny_t2v, folder)
        for name in (f"{kind}_folder", f"{kind}_plain"):
            shutil.copytree(tiny_t2v.path, tmp_path / name)
            made[name] = tmp_path / name
        for noise_expert in NoiseExpert:
            meant = write(folder / f"{noise_expert.value}{suffix}", stored(tiny_t2v, noise_expert))
            (old,) = weight_files(made[f"{kind}_folder"] / noise_expert.component)
            old.unlink()
            shutil.copy(folder / f"{noise_expert.value}{suffix}", old.with_suffix(suffix))
            save_file(meant, weight_files(made[f"{kind}_plain"] / noise_expert.component)[0])
        files = files_of(tiny_t2v, high=folder / f"high{suffix}", low=folder / f"low{suffix}")
        made[kind] = config_file(tmp_path / f"{kind}.toml", files)
    return made


def updates(path: Path) -> Path:
    """A full delta, DoRA and a pair, none of which a quantised weight can hold."""
    torch.manual_seed(0)
    pair = LowRank(torch.randn(4, 192) * 0.1, torch.randn(768, 4) * 0.1, 4.0)
    write_lora(path, AdapterState({
        "blocks.0.ffn.net.0.proj": DoRA(pair, torch.rand(768) + 0.5),
        "blocks.1.ffn.net.0.proj": FullDelta(torch.randn(768, 192) * 0.02),
        "blocks.1.attn1.to_q.bias": FullDelta(torch.randn(192) * 0.02),
        "blocks.2.ffn.net.0.proj": pair}))
    return path


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_generation_over_quantised_files_is_that_of_the_dequantised_folder(kind, quantised, succeed, tmp_path) -> None:
    """Also with full deltas and DoRA, beside the weights and folded."""
    lora = updates(tmp_path / "u_high_noise.safetensors")
    for number, more in enumerate(((), ("--lora", lora), ("--lora", lora, "--fold"))):
        latents = []
        for place in (("--config", quantised[kind]), ("--model", quantised[f"{kind}_plain"])):
            output = tmp_path / f"{number}_{len(latents)}.safetensors"
            succeed("generate", *place, *SAMPLING, "-o", output, *more)
            latents.append(load_file(output)["latents"])
        assert torch.equal(*latents), more


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merging_into_a_quantised_folder(kind, dtype, quantised, lapwan, tmp_path) -> None:
    write_lora(tmp_path / "l_high_noise.safetensors", random_lora(1, scale=0.02))
    line = ("merge", "--lora", "l_high_noise.safetensors", "-o", "m", "--verify", "--model")
    ran = lapwan(*line, quantised[f"{kind}_folder"], "--dry-run")
    assert ran.code == 2 and "add --dtype bfloat16" in ran.err
    assert lapwan(*line, quantised[f"{kind}_folder"], "--dtype", dtype).code == 0
    # The same merge into the dequantised folder, whose weights are fp32, rounded at the end.
    assert lapwan("merge", "--lora", "l_high_noise.safetensors", "-o", "plain", "--model",
                  quantised[f"{kind}_plain"]).code == 0
    rounded = getattr(torch, dtype)
    for noise_expert in NoiseExpert:
        ours, plain = (dict(resolve_base(str(tmp_path / name)).load(noise_expert).transformer.named_parameters())
                       for name in ("m", "plain"))
        for name, value in plain.items():
            if not torch.equal(ours[name], value):  # one rounding, not two
                assert ((ours[name] - value.to(rounded)).abs() <= torch.finfo(rounded).eps * value.abs()).all(), name
    (file,) = weight_files(tmp_path / "m" / "transformer")
    assert {info.dtype for info in read_header(file).tensors.values()} <= {STORED[dtype], "F32"}


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_training_over_quantised_files_resumes(kind, quantised, succeed, t2v_cache, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a hook cuts\nscissors cut\n", encoding="utf-8")
    reward = ("--prompts", "prompts.txt", "--reward", "tiny", "--size", "32x32", "--set", "held_out.count=0", "--set",
              "rollout.steps=2", "--set", "accumulate=1")
    for command, options in (("train-moe", ("--cache", t2v_cache)), ("srpo", reward)):
        line = (command, "--config", quantised[kind], *options, "-o", command, "--set", "allow_changed=true")
        succeed(*line, "--steps", "1", "--dry-run")
        assert not (tmp_path / command).exists()
        last = []
        for more in (("--steps", "1"), ("--steps", "2", "--resume")):
            succeed(*line, *more)
            rows = (tmp_path / command / "metrics.jsonl").read_text().splitlines()
            last.append(json.loads(rows[-1])["step"])
        assert last[1] == 2 * last[0]


def test_caching_with_separate_files(own_cache, succeed, lapwan, tiny_t2v, tmp_path) -> None:
    """The cache is the folder's; with umT5 in fp8 its latents are."""
    text = load_file(weights_of(tiny_t2v, "text_encoder"))
    shutil.copy(weights_of(tiny_t2v, "text_encoder"), tmp_path / "umt5.safetensors")
    fp8 = {n: v.to(torch.float8_e4m3fn) if v.dim() == 2 and "SelfAttention" in n and "relative" not in n else v
           for n, v in text.items()}
    save_file({**fp8, "spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "umt5_fp8.safetensors")
    make_video(tmp_path / "a.mp4")
    write_jsonl(tmp_path / "clips.jsonl", [{"video_path": "a.mp4", "caption": "a hook cuts"}])
    line = ("cache", "--dataset", "clips.jsonl", "--size", "32x48", "--num-frames", "9", "--set", "workers=0")
    sides = {"high": tiny_t2v.component(HIGH), "low": tiny_t2v.component(LOW)}
    configs = {
        "files": files_of(tiny_t2v, **sides, text_encoder=tmp_path / "umt5.safetensors"),
        "fp8": files_of(tiny_t2v, **sides, text_encoder=tmp_path / "umt5_fp8.safetensors"),
    }
    succeed(*line, "--model", "tiny-t2v", "-o", "folder")
    for name, files in configs.items():
        config = config_file(tmp_path / f"{name}.toml", files)
        succeed(*line, "--config", config, "-o", name, "--dry-run")
        assert not (tmp_path / name).exists()
        succeed(*line, "--config", config, "-o", name)
        same = {path.name: load_file(path) for path in sorted((tmp_path / "folder").glob("*.safetensors"))}
        for file, tensors in same.items():
            ours = load_file(tmp_path / name / file)
            assert ours.keys() == tensors.keys()
            equal = all(torch.equal(ours[key], tensors[key]) for key in tensors)
            assert equal or (name == "fp8" and not file.endswith("_wan.safetensors")), file
    succeed("cache", "--config", tmp_path / "files.toml", "-o", "files", "--preview", "1")
    wrong = config_file(tmp_path / "wrong.toml", files_of(tiny_t2v, **sides, vae=tmp_path / "none.pth"))
    ran = lapwan(*line, "--config", wrong, "-o", "x", "--dry-run")
    assert ran.code == 2 and "no such file" in ran.err


def test_inspecting_with_a_transformers_file_as_base(quantised, lapwan, tiny_t2v, tmp_path) -> None:
    for seed, noise_expert in enumerate(NoiseExpert):
        write_lora(tmp_path / f"l_{noise_expert.file_suffix}.safetensors", random_lora(seed))
    high, low = "l_high_noise.safetensors", "l_low_noise.safetensors"
    file, model = weights_of(tiny_t2v, "transformer"), tiny_t2v.path
    bases = file, model, tmp_path / "fp8" / "high.safetensors"
    printed = [lapwan("inspect-weights", high, "--base", base).out for base in bases]
    assert printed[0] == printed[1] and "update / weights of the base" in printed[2]
    ran = lapwan("inspect-weights", high, low, "--base", tmp_path / "gguf" / "high.gguf")
    assert ran.code == 2 and "has no low noise expert" in ran.err
