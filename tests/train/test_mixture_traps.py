"""What the first public code of this pipeline got wrong: each test here fails on that fault."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cache_cases import write_random_cache
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_cases import backward, draws_for, randomise

from lapwan.caching.index import write_index
from lapwan.caching.read import load_index
from lapwan.checkpoints.wan_keys import split_block
from lapwan.errors import UserError
from lapwan.lora.attach import attach
from lapwan.lora.layer import StackedLoraLinear
from lapwan.moe.mixture_file import read_mixture
from lapwan.names import NoiseExpert
from lapwan.tiny.resolve import resolve_base
from lapwan.wan.backbone import WanBackbone, load_transformer

FAMILIES = ("scissors", "hook", "suction", "other")
BOTH = pytest.mark.parametrize("noise_expert", list(NoiseExpert))


@BOTH
def test_the_diffusion_loss_alone_reaches_every_routed_expert_the_router_and_the_timestep_gate(make_moe, noise_expert):
    trainer = make_moe(router={"top_k": 4})
    randomise(trainer)
    grads = backward(trainer, noise_expert, [0, 1, 2, 3], only="loss/diffusion")
    other = NoiseExpert.LOW if noise_expert is NoiseExpert.HIGH else NoiseExpert.HIGH
    for name in trainer.parameters:
        if name.startswith(f"{other.value}."):
            assert name not in grads
            continue
        assert name in grads, name
        if name.endswith(".down"):  # every expert's rows, not only the stack as a whole
            rows = grads[name].abs().sum(dim=1)
            assert rows.shape[0] % len(FAMILIES) == 0 and bool((rows > 0).all()), name
        elif name.endswith(".up"):
            assert bool((grads[name].abs().sum(dim=0) > 0).all()), name
        elif name.startswith("router") and name.endswith("weight"):
            assert float(grads[name].abs().sum()) > 0, name
        assert bool(torch.isfinite(grads[name]).all()), name
    assert float(grads[f"{noise_expert.value}.timestep_gate.values_K"].abs().sum()) > 0


def test_at_b_zero_those_gradients_are_exactly_zero(make_moe):
    """Why the test above needs random B: a fresh mixture says nothing about its gates."""
    grads = backward(make_moe(), NoiseExpert.HIGH, [0, 1], only="loss/diffusion")
    assert float(grads["router.mlp.1.weight"].abs().max()) == 0.0
    assert float(grads["high.timestep_gate.values_K"].abs().max()) == 0.0


def test_only_the_experts_that_act_on_a_clip_get_its_gradient(make_moe):
    trainer = make_moe(router={"kind": "rule"})
    randomise(trainer)
    grads = backward(trainer, NoiseExpert.LOW, [1])  # the clip of the second family
    for name, gradient in grads.items():
        if name.endswith(".down"):
            by_family = gradient.abs().sum(dim=1).chunk(len(FAMILIES))
            assert [bool(g.sum() > 0) for g in by_family] == [False, True, False, False], name


def test_base_weights_are_bit_identical_after_training(make_moe):
    trainer = make_moe(steps=2, save_every=100)
    trainer.config.run_folder.mkdir()
    base = resolve_base("tiny")
    trainer.fit()
    for noise_expert, adapter in trainer.objective.adapters.items():
        adapter.detach()
        fresh = base.load(noise_expert).transformer.state_dict()
        state = adapter.transformer.state_dict()
        assert state.keys() == fresh.keys()
        assert all(torch.equal(state[name], fresh[name]) for name in fresh)


def test_training_moves_experts_router_and_gates_and_keeps_doing_so_after_a_save(make_moe):
    trainer = make_moe(steps=4, save_every=2, optimizer={"lr": 1e-2}, router={"top_k": 4})
    trainer.config.run_folder.mkdir()
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.fit()
    assert all(not torch.equal(before[n], p) for n, p in trainer.parameters.items() if not n.endswith(".down"))
    steps = sorted(trainer.config.run_folder.glob("step_*/lapwan.safetensors"))
    first, last = load_file(steps[0]), load_file(steps[-1])
    assert all(not torch.equal(first[n], last[n]) for n in first if n.endswith("lora_B.weight"))


@BOTH
def test_a_batch_of_two_different_labels_is_two_batches_of_one(make_moe, noise_expert):
    """Loss and gradients, every term of the loss, through the trainer's own accumulation."""
    grads = []
    for batch_size, accumulate in ((2, 1), (1, 2)):
        trainer = make_moe(batch_size=batch_size, accumulate=accumulate, router={"top_k": 2},
                           routing_loss={"entropy": 0.5, "entropy_floor": 5.0}, max_grad_norm=1e9)
        randomise(trainer)
        trainer._optimizer_step(noise_expert)
        own = {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}
        grads.append(own | {"usage": trainer.objective.usage_E.clone()})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        scale = float(grads[0][name].abs().max())
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=0, atol=2e-5 * max(scale, 1e-3), msg=name)


@BOTH
def test_gradients_with_activation_checkpointing_equal_those_without(make_moe, noise_expert):
    grads = []
    for recompute in (False, True):
        trainer = make_moe(activation_checkpointing=recompute, router={"top_k": 4})
        randomise(trainer)
        grads.append(backward(trainer, noise_expert, [0, 1]))
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_gates_are_those_of_this_forward_not_of_the_last_one(make_moe):
    """The loss of a clip does not depend on what ran before it."""
    trainer = make_moe(router={"kind": "rule"})
    randomise(trainer, 0.2)
    losses = []
    for before in (None, 1, 2):
        if before is not None:
            backward(trainer, NoiseExpert.HIGH, [before])
        batch = trainer.data.load_batch([0])
        trainer.objective.prepare(NoiseExpert.HIGH, [batch])
        with trainer.objective.loss(NoiseExpert.HIGH, batch, draws_for(trainer, NoiseExpert.HIGH, batch)) as loss:
            losses.append(float(loss.total_B[0].detach()))
    assert losses[0] == losses[1] == losses[2]


def test_labels_and_text_of_each_clip_reach_router_and_teacher(make_moe):
    trainer = make_moe()
    batch = trainer.data.load_batch([0, 1])
    mixture = trainer.objective.mixture
    p = mixture.route(batch.text, batch.label_weights_BE)
    assert not torch.allclose(p[0], p[1])
    trainer.objective.prepare(NoiseExpert.HIGH, [batch])
    draws = draws_for(trainer, NoiseExpert.HIGH, batch)
    with trainer.objective.loss(NoiseExpert.HIGH, batch, draws) as loss:
        own = loss.figures["loss/teacher_kl"]
    swapped = type(batch)(**{**vars(batch), "label_weights_BE": batch.label_weights_BE.flip(0)})
    with trainer.objective.loss(NoiseExpert.HIGH, swapped, draws) as loss:
        other = loss.figures["loss/teacher_kl"]
    assert not torch.allclose(own, other)


def test_the_text_router_reads_the_text_and_not_the_label_it_is_judged_by(make_moe):
    trainer = make_moe()
    batch = trainer.data.load_batch([0, 1])
    mixture = trainer.objective.mixture
    p = mixture.route(batch.text, batch.label_weights_BE)
    assert torch.equal(p, mixture.route(batch.text, batch.label_weights_BE.flip(0)))
    assert not torch.equal(p, mixture.route(batch.text[::-1], batch.label_weights_BE))


def test_hard_labels_are_one_hot_weights(make_moe, tiny_t2v, tmp_path):
    cache = write_random_cache(tmp_path / "hard", tiny_t2v)
    index = load_index(cache)
    write_index(replace(index, items=tuple(replace(item, label_weights=None) for item in index.items)))
    batch = make_moe(data={"cache": cache}).data.load_batch([0, 2])
    assert batch.label_weights_BE.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_fallback_clips_carry_no_teacher(make_moe):
    trainer = make_moe()
    grads = backward(trainer, NoiseExpert.HIGH, [3], only="loss/teacher_kl")  # the fixture's last clip is a fallback
    assert all(float(g.abs().max()) == 0.0 for g in grads.values())


def test_sigmas_lie_in_each_band(make_moe):
    trainer = make_moe(steps=25)
    for noise_expert in NoiseExpert:
        band = trainer.data.streams[noise_expert].sigma_rule.band
        seen = []
        for index in range(200):
            batch = trainer.data.load_batch([index % 4])
            keys = [(1, noise_expert.value, index, batch.ids[0])]
            from lapwan.train.objective import make_draws
            seen.append(float(make_draws(batch, keys, trainer.data.streams[noise_expert].sigma_rule).sigma_B))
        assert band.low <= min(seen) and max(seen) <= band.high
        histogram, _ = torch.histogram(torch.tensor(seen), 4, range=(band.low, band.high))
        assert float(histogram.min()) >= 25  # spread over the band, not on one side of it


@pytest.fixture
def trained(make_moe):
    """A mixture with non-zero experts, saved as a run saves it."""
    trainer = make_moe()
    randomise(trainer)
    trainer.config.run_folder.mkdir()
    trainer.save()
    return trainer, trainer.config.run_folder / "lapwan.safetensors"


def test_the_file_holds_experts_router_and_gates_by_module_name_and_nothing_of_the_base(trained):
    trainer, path = trained
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    for name in names:
        side, _, rest = name.partition(".")
        if side == "router":
            continue
        assert side in ("high_noise", "low_noise")
        if rest == "timestep_gate.values_K":
            continue
        module, family = rest.rsplit(".lora_", 1)[0].removesuffix(".alpha").rsplit(".", 1)
        assert split_block(module) is not None and family in FAMILIES
    trained_numbers = sum(p.numel() for p in trainer.parameters.values())
    alphas = sum(name.endswith(".alpha") for name in names)
    assert sum(t.numel() for t in load_file(path).values()) == trained_numbers + alphas
    assert metadata["lapwan.format"] == "mixture/1"


def test_save_then_load_gives_the_identical_output_on_both_noise_experts(trained):
    trainer, path = trained
    base = resolve_base("tiny")
    loaded = read_mixture(path, base)
    batch = trainer.data.load_batch([0, 1])
    x, sigma = torch.randn(batch.latents_BCTHW.shape), torch.tensor([0.9, 0.4])
    text = torch.randn(2, 8, base.text_dim)
    outputs = {}
    for noise_expert, adapter in trainer.objective.adapters.items():
        outs = []
        for mixture in (trainer.objective.mixture, loaded):
            if mixture is loaded:
                backbone = WanBackbone(load_transformer(base.spec, noise_expert))
                holder = attach(backbone.transformer, loaded.groups(noise_expert, None), gates_required=True).holder
            else:
                backbone, holder = trainer.objective.backbones[noise_expert], adapter.holder
            with torch.no_grad():
                mix = mixture.select(mixture.route(batch.text))
                with holder.scope(mixture.gates(noise_expert, mix, sigma)):
                    outs.append(backbone.velocity(x, 1000 * sigma, text))
        assert torch.equal(*outs)
        outputs[noise_expert] = outs[0]
    assert not torch.equal(outputs[NoiseExpert.HIGH], outputs[NoiseExpert.LOW])  # neither overwrote the other


def _edited(path, target, tensors=None, metadata=None):
    with safe_open(path, "pt") as file:
        said = dict(file.metadata())
    spec = json.loads(said["lapwan.mixture"])
    if metadata:
        metadata(spec)
    said["lapwan.mixture"] = json.dumps(spec)
    held = load_file(path)
    if tensors:
        tensors(held)
    save_file(held, target, said)
    return target


def test_what_does_not_fit_is_refused_by_name(trained, tmp_path):
    _, path = trained
    base = resolve_base("tiny")
    a = "high_noise.blocks.7.attn1.to_q.hook.lora_A.weight"

    def wrong_base(spec):
        spec["base"]["low"] = "0" * 64

    def wrong_rank(held):
        held[a] = held[a][:-1].clone()

    def wrong_block(held):
        for part in ("lora_A.weight", "lora_B.weight", "alpha"):
            own = held[f"high_noise.blocks.7.attn1.to_q.hook.{part}"]
            held[f"high_noise.blocks.40.attn1.to_q.hook.{part}"] = own.clone()

    def wrong_router(held):
        held["router.mlp.1.weight"] = held["router.mlp.1.weight"][:-1].clone()

    def no_expert(held):
        for name in [n for n in held if ".hook." in n and n.startswith("low")]:
            del held[name]

    def foreign(held):
        held["blocks.0.attn1.to_q.weight"] = torch.zeros(1)

    cases = [
        (None, wrong_base, "trained on another base: its low noise expert has fingerprint 000000000000"),
        (wrong_rank, None, r"high_noise.blocks.7.attn1.to_q.hook: rank mismatch"),
        (wrong_block, None, "block 40, the model has 8 blocks"),
        (wrong_router, None, r"'router.mlp.1.weight' of the router has shape \[511, 96\], expected \[512, 96\]"),
        (no_expert, None, "expert 'hook' of the low noise expert has no tensors"),
        (lambda held: held["router.mlp.1.weight"][3].fill_(float("nan")), None, "'router.mlp.1.weight' holds NaN"),
        (foreign, None, "tensor 'blocks.0.attn1.to_q.weight' is not part of a mixture"),
        (lambda held: held.pop("low_noise.timestep_gate.values_K"), None, "of the timestep gate is missing"),
    ]
    for index, (tensors, metadata, message) in enumerate(cases):
        target = _edited(path, tmp_path / f"{index}.safetensors", tensors, metadata)
        with pytest.raises(UserError, match=message):
            read_mixture(target, base)
    with pytest.raises(UserError, match="was trained for t2v, but the model is i2v"):
        read_mixture(path, resolve_base("tiny-i2v"))


def test_a_frozen_base_lora_acts_with_alpha_base_and_stays_as_it_was(make_lora, make_moe, tmp_path):
    stage1 = make_lora(output=tmp_path / "stage1", optimizer={"lr": 1e-2})
    stage1.config.run_folder.mkdir()
    stage1.fit()
    files = {e: tmp_path / "stage1" / f"lapwan_{e.file_suffix}.safetensors" for e in NoiseExpert}
    outputs = []
    for alpha in (1.0, 0.0):
        trainer = make_moe(base_lora=files, alpha_base=alpha)
        layer = next(m for m in trainer.objective.adapters[NoiseExpert.LOW].transformer.modules()
                     if isinstance(m, StackedLoraLinear))
        assert not layer.frozen_down_RI.requires_grad and layer.frozen_down_RI.shape[0] > 0
        frozen = layer.frozen_up_OR.clone()
        assert float(frozen.abs().max()) > 0
        batch = trainer.data.load_batch([0])
        trainer.objective.prepare(NoiseExpert.LOW, [batch])
        with trainer.objective.loss(NoiseExpert.LOW, batch, draws_for(trainer, NoiseExpert.LOW, batch)) as loss:
            outputs.append(float(loss.terms["loss/diffusion"][0].detach()))
            loss.total_B.sum().backward()
        assert torch.equal(layer.frozen_up_OR, frozen)
        assert trainer.objective.mixture.base_lora[NoiseExpert.LOW]["path"] == str(files[NoiseExpert.LOW])
    assert outputs[0] != outputs[1]
