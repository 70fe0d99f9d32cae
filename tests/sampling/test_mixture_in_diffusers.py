"""`merge --moe` at a mix, loaded by diffusers, against lapwan with that hint; routers that see sigma at generation."""

from __future__ import annotations

import dataclasses

import torch
from adapter_cases import random_mixture
from diffusers import WanPipeline

from lapwan.moe.mixture_file import write_mixture
from lapwan.sampling.adapters import AdapterSet
from lapwan.sampling.generator import Generator


def test_a_merged_mix_gives_the_same_video_in_diffusers_where_w_is_constant(t2v, small, lapwan, tmp_path) -> None:
    mixture = random_mixture(t2v, flow_shift=t2v.flow_shift, steps=3)
    with torch.no_grad():
        for gate, w in zip(mixture.timestep_gates.values(), (0.6, 0.9), strict=True):
            gate.values_K.copy_(torch.full_like(gate.values_K, w).expm1().log())
    write_mixture(tmp_path / "m.safetensors", mixture)
    merged = lapwan("merge", "--moe", "m.safetensors", "--mix", "hook=0.7,suction=0.3", "--format", "diffusers",
                    "-o", "flat.safetensors")
    assert merged.code == 0 and "w = 0.6000 (from 0.6000 to 0.6000" in merged.out, merged
    pipeline = WanPipeline.from_pretrained(t2v.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    request = small(t2v, hint="hook:0.7,suction:0.3", size=(32, 48), guidance=2.0)

    def theirs() -> torch.Tensor:
        return pipeline(
            prompt=request.prompt, negative_prompt=request.negative_prompt, height=32, width=48, num_frames=5,
            num_inference_steps=3, guidance_scale=2.0, guidance_scale_2=2.0,
            generator=torch.Generator().manual_seed(request.seed), output_type="latent",
        ).frames

    base = theirs()
    pipeline.load_lora_weights(tmp_path / "flat_high_noise.safetensors", adapter_name="high")
    pipeline.load_lora_weights(tmp_path / "flat_low_noise.safetensors", adapter_name="low",
                               load_into_transformer_2=True)
    ours = Generator(t2v, AdapterSet(mixture=mixture)).latents(request)
    found = theirs()
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(found, ours, rtol=0, atol=2e-4)


def test_a_router_that_sees_sigma_gives_each_step_its_own_gates(t2v, small) -> None:
    mixture = random_mixture(t2v, router_sigma=True, gate_ema=0.5, top_k=4)
    with torch.no_grad():
        mixture.router.sigma.weight.normal_()
    generator = Generator(t2v, AdapterSet(mixture=mixture))
    request = small(t2v)
    video = generator.generate(request)
    mix = generator.route(request)
    sigmas = [float(sigma) for sigma in video.facts["moe"]["gates"]]
    features = [generator.text_features(request.prompt)]
    expected = mixture.route_over_sigmas(features, None, list(mix.by_sigma))
    for (sigma, mix_1E), expected_1E in zip(mix.by_sigma.items(), expected, strict=True):
        assert torch.equal(mix_1E, expected_1E) and torch.equal(mix.at(sigma), mix_1E)
    rows = [torch.tensor(list(row.values())) for row in video.facts["moe"]["gates"].values()]
    shares = [row / row.sum() for row in rows]
    assert len(sigmas) == 3 and not torch.allclose(shares[0], shares[-1], atol=1e-3)
    hinted = generator.route(dataclasses.replace(request, hint="hook"))
    assert hinted.source == "hint" and not hinted.by_sigma  # a hint holds for the whole video
