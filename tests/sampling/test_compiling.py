"""When blocks are compiled, without compiling any."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lapwan.names import NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.train.lora import recipe as lora_recipe
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.transformer.block import block_forward
from lapwan.wan.transformer.compile import (
    CompileClock,
    CompileReport,
    compiled_block,
    compiling_saves,
    worth_compiling,
)
from lapwan.wan.transformer.kernels import Triton

A14B = 5120


def test_it_pays_from_about_150_steps_or_a_video_at_480p_on():
    assert compiling_saves(A14B, 5376, 200, training=True) and not compiling_saves(A14B, 5376, 100, training=True)
    assert compiling_saves(A14B, 32760, 80, training=False) and not compiling_saves(A14B, 5376, 80, training=False)
    assert not compiling_saves(192, 200, 10_000, training=True)  # the embedded model


def test_never_by_itself_on_a_cpu(tiny_t2v):
    assert not worth_compiling(load_transformer(tiny_t2v, NoiseExpert.HIGH), (21, 60, 104), 10**9, training=True)


def test_an_evaluation_by_our_kernels_is_not_compiled_by_itself():
    def on_a_gpu(dtype: torch.dtype) -> SimpleNamespace:
        weight = torch.empty(A14B, 16, device="meta", dtype=dtype)
        return SimpleNamespace(patch_embedding=SimpleNamespace(weight=weight),
                               parameters=lambda: [SimpleNamespace(device=torch.device("cuda"))],
                               config=SimpleNamespace(patch_size=(1, 2, 2)))

    for has_triton in (True, False):
        size, times, triton = (21, 60, 104), 80, Triton(has_triton)
        assert worth_compiling(on_a_gpu(torch.bfloat16), size, times, False, triton) is not has_triton
        assert worth_compiling(on_a_gpu(torch.float32), size, times, False, triton)
        assert worth_compiling(on_a_gpu(torch.bfloat16), size, times, True, triton)


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_training_does_as_told(mode, tiny_t2v, t2v_cache, tmp_path):
    from lapwan.settings.train_lora import TrainLoraSettings
    from lapwan.tiny.resolve import resolve_base
    from lapwan.train import recipe

    settings = TrainLoraSettings.model_validate({
        "model": "tiny", "output": tmp_path / "run", "data": {"cache": t2v_cache}, "steps": 1, "compile": mode,
        "targets": {"last_blocks": 1, "ffn_last_blocks": 1}})
    base = resolve_base("tiny")
    trainer = lora_recipe.prepare(settings, base, recipe.read_data(settings, base), torch.device("cpu"))
    for backbone in trainer.objective.backbones.values():
        assert backbone.options.block is (compiled_block() if mode == "on" else block_forward)


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_generation_does_as_told(mode, tiny_t2v, small):
    generator = Generator(tiny_t2v, compile=mode)
    with torch.compiler.set_stance("force_eager"):  # the compiled function runs, without waiting for the compiler
        generator.latents(small(tiny_t2v, steps=1))
    used = generator.noise_experts.resident()
    assert used
    assert generator.noise_experts.compiled == (set(used) if mode == "on" else set())
    for noise_expert in used:
        block = generator.noise_experts.backbone(noise_expert).options.block
        assert block is (compiled_block() if mode == "on" else block_forward)


def test_it_says_how_long_it_took_once(monkeypatch, capsys):
    clock = CompileClock()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    report = CompileReport(clock)
    report.log()
    clock.begin(None)
    clock.begin(None)  # one inside another is one
    clock.end(None)
    clock.end(None)
    report.log()
    report.log()
    said = capsys.readouterr().err
    assert said.count("compiled 1 block graphs in") == 1 and "/somewhere" in said


def test_one_function_serves_all(tiny_t2v):
    models = [WanBackbone(load_transformer(tiny_t2v, noise_expert)) for noise_expert in NoiseExpert]
    for model in models:
        model.compile()
    assert models[0].options.block is models[1].options.block is compiled_block()
    models[0].compile(False)
    assert models[0].options.block is block_forward
