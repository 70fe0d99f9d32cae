"""inspect-weights on a mixture's gates: curves and scales of the file, routing over its run, the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lapwan.commands.inspect_weights import run
from lapwan.lora.state import AdapterState, LowRank
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.mixture_file import write_mixture
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.settings.load import load

FAMILIES = ("scissors", "hook", "other")


def write(path: Path, router: str = "text", alpha: float = 2.0) -> Mixture:
    torch.manual_seed(0)
    bands = {NoiseExpert.HIGH: (0.875, 1.0), NoiseExpert.LOW: (0.0, 0.875)}
    spec = MixtureSpec(FAMILIES, {}, "t2v", bands, 12, router=router, flow_shift=5.0, steps=8, router_temperature=0.7)
    states = {e: {family: AdapterState({
        path: LowRank(torch.randn(2, 16), torch.randn(16, 2), alpha)
        for path in ("blocks.0.attn1.to_q", "blocks.3.ffn.net.2")}) for family in FAMILIES} for e in NoiseExpert}
    made = Mixture(spec, states)
    with torch.no_grad():
        for noise_expert in NoiseExpert:
            made.timestep_gate(noise_expert).values_K.copy_(torch.randn(8))
        for parameter in made.router.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mixture(path, made, {"lapwan.step": "60"})
    return made


def write_metrics(folder: Path, lines: int = 60) -> list[dict[str, Any]]:
    """A run whose router moves from `other` to `hook`, with a line in which no clip had a label."""
    made = []
    for step in range(1, lines + 1):
        hook = step / lines
        line: dict[str, Any] = {"step": step, "noise_expert": "high" if step % 2 else "low", "loss": 1.0,
                                "loss/routing_entropy": 1.0 - 0.9 * hook, "metrics/expert_usage_scissors": 0.0,
                                "metrics/expert_usage_hook": hook, "metrics/expert_usage_other": 1 - hook}
        if step != 5:
            line |= {"metrics/routing_accuracy": hook, "loss/teacher_kl": 2.0 - hook}
        made.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))
    return made


def inspect(capsys: pytest.CaptureFixture, *files: object, **options: object) -> tuple[dict, str]:
    """The JSON, and the tables that go with it."""
    found = []
    for more in ({"json_file": "-"}, {}):
        values = {"files": [str(f) for f in files], **more, **(options if not more else {})}
        run(load(InspectWeightsSettings, options=values, environment={}), RunOptions())
        found.append(capsys.readouterr().out)
    return json.loads(found[0]), " ".join(found[1].split())


def test_the_files_own_curves_scales_and_what_they_amount_to(tmp_path, capsys):
    made = write(tmp_path / "m.safetensors", alpha=3.0)
    document, said = inspect(capsys, tmp_path / "m.safetensors")
    t = [1 - n * (1 - 0.001) / 8 for n in range(8)]
    sigmas = [5 * x / (1 + 4 * x) for x in t]
    for noise_expert in NoiseExpert:
        own = [s for s in sigmas if (s >= 0.875) == (noise_expert is NoiseExpert.HIGH)]
        w = made.timestep_gate(noise_expert)(torch.tensor(own)).detach()
        described = document["mixture"][noise_expert.value]
        used = described["timestep_gate"]["sampling"]
        assert used["steps"] == len(own) and used["mean"] == pytest.approx(float(w.mean()), rel=1e-5)
        assert (used["min"], used["max"]) == pytest.approx((float(w.min()), float(w.max())), rel=1e-5)
        for family, state in made.states[noise_expert].items():
            norm = math.sqrt(sum(float(e.delta(torch.float64).square().sum()) for e in state.entries.values()))
            one = described["families"][family]
            assert one["alpha_over_rank"] == 1.5
            assert one["gated_norm"] == pytest.approx(float(w.mean()) * norm, rel=1e-5)
        assert f"timestep gate of {noise_expert.value}, w(sigma): " in said
        assert f"over its {len(own)} sampling steps: mean {float(w.mean()):.3g}" in said
    router = document["routing"]["router"]
    assert (router["kind"], router["top_k"], router["temperature"]) == ("text", 2, 0.7)
    assert router["parameters"] == sum(p.numel() for p in made.router.parameters()) > 0
    assert router["by_label"] is None and document["routing"]["windows"] == []
    assert "usage and entropy of the router: not in the file; give the run folder" in said
    assert not any("usage of" in rule["rule"] for rule in document["verdict"]["rules"])


def test_a_label_routers_answers_are_in_the_file(tmp_path, capsys):
    made = write(tmp_path / "m.safetensors", router="label")
    document, said = inspect(capsys, tmp_path / "m.safetensors")
    weight, bias = made.router.linear.weight.detach(), made.router.linear.bias.detach()
    for n, family in enumerate(FAMILIES):
        answer = document["routing"]["router"]["by_label"][family]
        want = torch.softmax((weight[:, n] + bias) / 0.7, dim=0)
        assert list(answer["mix"].values()) == pytest.approx(want.tolist(), rel=1e-5)
        assert answer["entropy"] == pytest.approx(float(-(want * want.log()).sum()), rel=1e-5)
    assert "the router's gates for each label" in said


def test_routing_over_a_run_comes_from_its_metrics(tmp_path, capsys):
    write(tmp_path / "step_60" / "m.safetensors")
    lines = write_metrics(tmp_path, 90)  # as if 30 steps after the last checkpoint
    for files in ((tmp_path,), (tmp_path / "step_60" / "m.safetensors",)):
        document, said = inspect(capsys, *files)
        windows = document["routing"]["windows"]
        assert [(w["from_step"], w["to_step"]) for w in windows] == [(1, 20), (21, 40), (41, 60)]
        assert all(w["lines"] == 20 for w in windows)
        for window in windows:
            own = lines[window["from_step"] - 1 : window["to_step"]]
            for family in FAMILIES:
                mean = sum(line[f"metrics/expert_usage_{family}"] for line in own) / 20
                assert window["usage"][family] == pytest.approx(mean)
            assert window["entropy"] == pytest.approx(sum(line["loss/routing_entropy"] for line in own) / 20)
            known = [line["metrics/routing_accuracy"] for line in own if "metrics/routing_accuracy" in line]
            assert window["accuracy"] == pytest.approx(sum(known) / len(known))
            assert len(known) == (19 if window["from_step"] == 1 else 20)
        assert "routing over the run (usage after top-k)" in said and "41 - 60" in said
        rules = {rule["rule"]: rule for rule in document["verdict"]["rules"]}
        # 5 % and 70 % of four experts are 6.7 % and 73 % of three: `scissors` is never used
        assert rules["usage of 'scissors' over the last steps"]["status"] == "warn"
        assert rules["usage of 'scissors' over the last steps"]["threshold"] == "0.067 to 0.73"
        assert rules["routing entropy, nats, over the last steps"]["status"] == "good"


def test_a_collapsed_router_and_too_few_lines(tmp_path, capsys):
    write(tmp_path / "m.safetensors")
    lines = write_metrics(tmp_path)
    for line in lines:
        line["loss/routing_entropy"] = 0.1
    for count, judged in ((60, True), (19, False)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
        document, _ = inspect(capsys, tmp_path)
        rules = {rule["rule"]: rule["status"] for rule in document["verdict"]["rules"]}
        assert rules.get("routing entropy, nats, over the last steps") == ("warn" if judged else None)
        assert len(document["routing"]["windows"]) == (3 if judged else 1)


def test_the_picture_shows_gates_and_usage(tmp_path, capsys):
    write(tmp_path / "m.safetensors")
    sizes, greys = [], []
    for n, lines in enumerate((0, 60)):
        if lines:
            write_metrics(tmp_path, lines)
        inspect(capsys, tmp_path, plot=str(tmp_path / f"{n}.png"))
        with Image.open(tmp_path / f"{n}.png") as image:
            sizes.append(image.size)
            right = image.convert("RGB").crop((900, 20, 1650, 470))  # the right half of the row of charts
            greys.append(sum(count for count, colour in right.getcolors(1 << 20) if max(colour) < 235))
    assert sizes[0] == sizes[1] and sizes[0][1] > 560  # a row of charts above the heat maps
    assert greys[0] == 0 and greys[1] > 500  # usage only where it is known
