"""Separate files in the original layout give what the same model in a diffusers folder gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from sampling_cases import SMALL, frames, refused
from transformers import UMT5EncoderModel

from lapwan.checkpoints.wan_keys import to_original
from lapwan.models.fingerprints import text_encoder_fingerprint, vae_fingerprint
from lapwan.models.original_layout import t5_to_transformers
from lapwan.models.separate_files import transformer_config
from lapwan.models.spec import ModelSpec, read_spec
from lapwan.names import NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.settings.model import ModelFilesSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.wan.backbone import load_transformer
from lapwan.wan.vae import decode


def original_transformer(name: str) -> str:
    """The inverse of the layouts' table in the notes, by hand."""
    path, _, leaf = name.rpartition(".")
    if name == "scale_shift_table":
        return "head.modulation"
    if leaf == "scale_shift_table":
        return f"{path}.modulation"
    if (known := to_original(path)) is not None:
        return f"{known}.{leaf}"
    for ours, theirs in (("attn1.norm", "self_attn.norm"), ("attn2.norm", "cross_attn.norm"), (".norm2", ".norm3")):
        if ours in path:
            return f"{path.replace(ours, theirs)}.{leaf}"
    return name


def original_vae(names: set[str]) -> dict[str, str]:
    """diffusers' name -> original name, found by asking diffusers' own converter about every name there may be."""
    inner = ["residual.0.gamma", "residual.3.gamma", "norm.gamma", "0.gamma", "gamma"]
    inner += [f"{p}.{leaf}" for leaf in ("weight", "bias") for p in
              ("residual.2", "residual.6", "shortcut", "resample.1", "time_conv", "to_qkv", "proj")]
    candidates = [f"{c}.{leaf}" for c in ("conv1", "conv2") for leaf in ("weight", "bias")]
    for side, group in (("encoder", "downsamples"), ("decoder", "upsamples")):
        candidates += [f"{side}.{c}.{leaf}" for c in ("conv1", "head.2") for leaf in ("weight", "bias")]
        candidates += [f"{side}.head.0.gamma"]
        candidates += [f"{side}.{group}.{i}.{part}" for i in range(16) for part in inner]
        candidates += [f"{side}.middle.{i}.{part}" for i in range(3) for part in inner]
    found = {}
    for candidate in candidates:
        (name,) = convert_wan_vae_to_diffusers({candidate: torch.zeros(1)})
        if name in names:
            found[name] = candidate
    assert set(found) == names
    return found


def original_t5(name: str) -> str:
    outer = {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}
    if name in outer:
        return outer[name]
    inner = {
        "0.layer_norm": "norm1", "1.layer_norm": "norm2", "0.SelfAttention.relative_attention_bias":
        "pos_embedding.embedding", "1.DenseReluDense.wi_0": "ffn.gate.0", "1.DenseReluDense.wi_1": "ffn.fc1",
        "1.DenseReluDense.wo": "ffn.fc2", **{f"0.SelfAttention.{c}": f"attn.{c}" for c in "qkvo"},
    }
    _, _, block, _, rest = name.removesuffix(".weight").split(".", 4)
    return f"blocks.{block}.{inner[rest]}.weight"


class Pair(NamedTuple):
    folder: ModelSpec
    files: ModelFilesSettings


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def pair(request, tmp_path_factory, t2v, i2v) -> Pair:
    """A diffusers folder with Wan2.1's latent statistics, and the same weights as the release stores them."""
    source = t2v if request.param == "t2v" else i2v
    root = tmp_path_factory.mktemp(f"files_{request.param}")
    folder = root / "folder"
    folder.mkdir()
    for part in source.path.iterdir():
        if part.name not in ("vae", "scheduler"):
            (folder / part.name).symlink_to(part)
    scheduler = json.loads((source.path / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler").mkdir()
    official = {**scheduler, "flow_shift": 12.0 if request.param == "t2v" else 5.0}  # what the files stand for
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(official))
    torch.manual_seed(1)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=2).eval()
    vae.save_pretrained(folder / "vae")
    state = vae.state_dict()
    names = original_vae(set(state))
    torch.save({names[name]: value for name, value in state.items()}, root / "Wan2.1_VAE.pth")
    text = UMT5EncoderModel.from_pretrained(source.path / "text_encoder")
    parameters = {original_t5(name): value.detach() for name, value in text.named_parameters()}
    torch.save(parameters, root / "models_t5_umt5-xxl-enc-bf16.pth")
    for noise_expert in NoiseExpert:
        out = root / f"{noise_expert.value}_noise_model"
        out.mkdir()
        weights = WanTransformer3DModel.from_pretrained(source.component(noise_expert)).state_dict()
        tensors = {original_transformer(name): value.contiguous() for name, value in weights.items()}
        converted = convert_wan_transformer_to_diffusers(dict(tensors))
        assert converted.keys() == weights.keys() and all(torch.equal(converted[n], weights[n]) for n in weights)
        write_sharded(out, tensors)
        (out / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 4, "dim": 192}))
    files = ModelFilesSettings(
        high=root / "high_noise_model", low=root / "low_noise_model", vae=root / "Wan2.1_VAE.pth",
        text_encoder=root / "models_t5_umt5-xxl-enc-bf16.pth", tokenizer=source.path / "tokenizer",
    )
    return Pair(read_spec(folder), files)


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    half = len(tensors) // 2
    names = list(tensors)
    index = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_the_same_outputs_to_the_bit(pair, small) -> None:
    base = resolve_base(pair.files)
    assert (base.spec.task, base.spec.boundary, base.spec.flow_shift) == (
        pair.folder.task, pair.folder.boundary, pair.folder.flow_shift
    )
    image = Image.new("RGB", (48, 32), (180, 60, 60)) if base.task == "i2v" else None
    ours, theirs = Generator(base), Generator(pair.folder)
    request = small(base.spec, image=image, guidance=3.0, negative_prompt="模糊")
    latents = ours.latents(request)
    assert torch.equal(latents, theirs.latents(request))
    with torch.no_grad():
        assert torch.equal(decode(ours.vae(), latents), decode(theirs.vae(), latents))


def test_the_fingerprint_does_not_depend_on_the_layout(pair) -> None:
    """So a mixture or a cache made with the folder is recognised with the files."""
    base = resolve_base(pair.files)
    for noise_expert in NoiseExpert:
        assert base.fingerprint(noise_expert) == pair.folder.fingerprint(noise_expert)


def test_a_pth_file_has_an_identity(pair, tmp_path) -> None:
    before = vae_fingerprint(resolve_base(pair.files).spec), text_encoder_fingerprint(resolve_base(pair.files).spec)
    state = torch.load(pair.files.vae)
    state["conv1.weight"] += 1
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    other = resolve_base(pair.files.model_copy(update={"vae": tmp_path / "Wan2.1_VAE.pth"})).spec
    assert vae_fingerprint(other) != before[0] and text_encoder_fingerprint(other) == before[1]


def test_bf16_keeps_what_diffusers_keeps_in_fp32(pair) -> None:
    base = resolve_base(pair.files)
    ours = load_transformer(base.spec, NoiseExpert.LOW, torch.bfloat16)
    theirs = load_transformer(pair.folder, NoiseExpert.LOW, torch.bfloat16)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    for (name, a), (other, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        # The rope table is made, not stored: as long as the class makes it, in fp32.
        assert name == other and a.dtype == b.dtype == torch.float32 and torch.equal(a[: len(b)], b), name
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_repack_with_prefixed_names_and_safetensors(pair, tmp_path, small) -> None:
    """One file a part, as ComfyUI repacks: `model.diffusion_model.` names, VAE and umT5 as safetensors."""
    changed = {}
    for key, source in (("high", pair.files.high), ("low", pair.files.low)):
        tensors = {f"model.diffusion_model.{n}": v for f in sorted(source.glob("*.safetensors"))
                   for n, v in load_file(f).items()}
        changed[key] = tmp_path / key / "model.safetensors"
        changed[key].parent.mkdir()
        save_file(tensors, changed[key])
        (changed[key].parent / "config.json").write_text((source / "config.json").read_text())
    vae = torch.load(pair.files.vae)
    save_file({n: v.contiguous() for n, v in vae.items()}, tmp_path / "wan_2.1_vae.safetensors")
    text = {t5_to_transformers(n): v.clone() for n, v in torch.load(pair.files.text_encoder).items()}
    save_file(text, tmp_path / "umt5.safetensors")
    files = pair.files.model_copy(update={
        **changed, "vae": tmp_path / "wan_2.1_vae.safetensors", "text_encoder": tmp_path / "umt5.safetensors",
    })
    image = Image.new("RGB", (48, 32)) if pair.folder.task == "i2v" else None
    request = small(pair.folder, image=image)
    assert torch.equal(Generator(resolve_base(files)).latents(request), Generator(pair.folder).latents(request))


def test_heads_are_128_wide_without_a_config(tmp_path) -> None:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=24, freq_dim=32, ffn_dim=48, num_layers=1,
    )
    tensors = {original_transformer(n): v.contiguous() for n, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    config = transformer_config([tmp_path / "a.safetensors"])
    for key in ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
                "ffn_dim", "num_layers", "cross_attn_norm", "rope_max_seq_len", "qk_norm"):
        assert config[key] == model.config[key], key


def toml(files: ModelFilesSettings, **changes: object) -> str:
    said = {**files.model_dump(mode="json", exclude_none=True), **changes}
    return "[model]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in said.items() if v is not None)


def test_the_command_takes_them_in_toml(pair, lapwan, tmp_path) -> None:
    (tmp_path / "c.toml").write_text(toml(pair.files))
    extra: tuple[str, ...] = ()
    if pair.folder.task == "i2v":
        Image.new("RGB", (48, 32)).save(tmp_path / "first.png")
        extra = ("--image", "first.png")
    ran = lapwan("generate", "--config", "c.toml", "--prompt", "电凝钩", "-o", "a", *SMALL, *extra)
    assert ran.code == 0, ran.err
    same = lapwan("generate", "--model", str(pair.folder.path), "--prompt", "电凝钩", "-o", "b", *SMALL, *extra)
    assert same.code == 0 and (frames(tmp_path / "a") == frames(tmp_path / "b")).all()


def test_what_is_wrong_with_them_is_one_line(pair, lapwan, tmp_path) -> None:
    def run(**changes: object):
        (tmp_path / "c.toml").write_text(toml(pair.files, **changes))
        return lapwan("generate", "--config", "c.toml", "--prompt", "x", "-o", "a", *SMALL)

    refused(run(vae="none.pth"), "no such file: none.pth")
    refused(run(low=None), "low is missing")
    refused(run(vae=str(pair.files.text_encoder)), "is not Wan's VAE")
    refused(run(text_encoder=str(pair.files.vae)), "is not a umT5 encoder")
    refused(run(high=str(pair.files.vae)), "is not a Wan transformer but Wan's VAE")
    refused(run(tokenizer=str(tmp_path)), "is not a tokenizer folder")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    refused(run(vae="bad.pth"), "cannot read bad.pth as weights")
