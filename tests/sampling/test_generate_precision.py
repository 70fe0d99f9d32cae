"""Generating with quantised transformers and text encoder, streamed or not; the low noise expert prefetched."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from sampling_cases import generate, refused

from lapwan import VideoGenerator
from lapwan.lora.layer import FrozenLinear
from lapwan.memory.generation import text_encoder_bytes
from lapwan.memory.streaming import offload_by_hooks
from lapwan.names import Precision
from lapwan.sampling.generator import Generator
from lapwan.sampling.result import read_metadata
from lapwan.wan.text import encode_text, load_text_encoder

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPTS = ["电凝钩切割组织", "scissors cut the cystic duct, smoke"]


@pytest.mark.parametrize(("dtype", "cosine"), [
    ("fp8", 0.98), pytest.param("int8", 0.999, marks=pytest.mark.slow), ("nf4", 0.9)])
def test_quantised_videos_resemble_the_plain_one_wherever_weights_wait(dtype, cosine, tmp_path) -> None:
    said = {"num_frames": 9, "size": (64, 64), "steps": 4, "guidance": 3.0, "seed": 3}
    plain = VideoGenerator("tiny").generate(PROMPTS[0], **said)
    made = [VideoGenerator("tiny", dtype=dtype, memory=memory).generate(PROMPTS[0], **said)
            for memory in ("both", "stream")]
    assert torch.equal(made[0].latents, made[1].latents)
    assert made[0].facts["precision"] == dtype and "precision" not in plain.facts
    near = torch.nn.functional.cosine_similarity(made[0].latents.flatten(), plain.latents.flatten(), dim=0)
    assert cosine < near < 1 - 1e-7


@pytest.mark.parametrize(("form", "bound"), [(Precision.FP8, 0.15), (Precision.INT8, 0.03)])
def test_a_quantised_text_encoder(form, bound, t2v, own_cache) -> None:
    plain = load_text_encoder(t2v)
    for _ in range(2):  # quantised, then read from where it is kept
        encoder = load_text_encoder(t2v, precision=form)
        layers = [m for m in encoder.model.modules() if isinstance(m, FrozenLinear)]
        assert len(layers) == 7 * len(encoder.model.encoder.block)
        assert encoder.model.encoder.embed_tokens is encoder.model.shared
        for ours, theirs in zip(encode_text(encoder, PROMPTS), encode_text(plain, PROMPTS), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert 1e-5 < (ours - theirs).norm() / theirs.norm() < bound
    assert len(list((own_cache / "quantised").glob("*/block_*.safetensors"))) == 3
    whole = sum(t.nbytes for t in (*encoder.model.parameters(), *(
        b for n, b in encoder.model.named_buffers() if not n.endswith("scale"))))
    assert text_encoder_bytes(t2v, form) == pytest.approx(whole, rel=0.01)


def test_a_streamed_text_encoder_gives_the_same_bits(t2v) -> None:
    encoder = load_text_encoder(t2v)
    expected = {len(prompts): encode_text(encoder, prompts) for prompts in (PROMPTS, PROMPTS[:1])}
    offload = offload_by_hooks(encoder.model, torch.device("cpu"), range(3), "encoder.block")
    for _ in range(2):
        offload.onload()
        for prompts in (PROMPTS, PROMPTS[:1]):
            made = encode_text(encoder, prompts)
            assert all(torch.equal(a, b) for a, b in zip(made, expected[len(prompts)], strict=True))
        offload.offload()
    assert offload.ring is not None and offload.ring.copied_bytes > 0
    assert text_encoder_bytes(t2v, None, streamed=True) < text_encoder_bytes(t2v)


def test_streaming_streams_the_text_encoder_too(t2v, small) -> None:
    generator = Generator(t2v, memory="stream")
    streamed = generator.latents(small(t2v, steps=3))
    assert generator._text_offload is not None and generator._text_offload.ring is not None
    assert torch.equal(streamed, Generator(t2v).latents(small(t2v, steps=3)))


def test_the_options_are_recorded_and_repeated(lapwan, tmp_path) -> None:
    ran = generate(lapwan, "--dtype", "int8", "--text-dtype", "int8", "--memory", "stream", output="a.safetensors")
    assert ran.code == 0 and "8 blocks of the active noise expert stream from host memory to cpu" in ran.err, ran.err
    told = read_metadata(tmp_path / "a.safetensors")
    assert json.loads(told["settings"])["dtype"] == "int8" and json.loads(told["facts"])["text_precision"] == "int8"
    again = lapwan("generate", "--from", "a.safetensors", "-o", "b.safetensors")
    assert again.code == 0 and torch.equal(*(load_file(tmp_path / f"{n}.safetensors")["latents"] for n in "ab"))


def test_a_cap_is_planned_for_and_said(lapwan) -> None:
    ran = generate(lapwan, "--memory", "20", "--dry-run")
    assert ran.code == 0 and "(within 20 GiB)" in ran.err and "predicted peak" in ran.err, ran.err
    assert re.search(r"\n +cpu .* 20\.00\n", ran.err), ran.err
    refused(generate(lapwan, "--memory", "lots"), "'lots' is not understood; write auto, both, one, stream, or a limit")
    refused(generate(lapwan, "--dtype", "int4"), "int4")


def test_the_other_noise_expert_is_read_while_the_first_samples(t2v, small, capsys) -> None:
    """Its reading begins before the first noise expert's last step and is not repeated."""
    def reads() -> list[str]:
        return re.findall("(?:loading|reading) the .* noise expert.*", capsys.readouterr().err)

    generator, request = Generator(t2v, memory="stream"), small(t2v, steps=4)
    first = generator.latents(request)
    assert reads() == ["loading the high noise expert", "reading the low noise expert in the background"]
    assert torch.equal(first, generator.latents(request)) and not reads()
    assert torch.equal(first, Generator(t2v).latents(request))
    reads()
    assert torch.equal(first, Generator(t2v, memory="both").latents(request))
    assert reads() == ["loading the high noise expert", "loading the low noise expert"]
