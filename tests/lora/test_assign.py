"""Which LoRA goes to which noise expert, for every way of saying it."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_cases import random_state, shapes
from safetensors.torch import save_file

from lapwan.errors import UserError
from lapwan.lora.assign import LoraRequest, assign, assign_to_transformer, group_by_noise_expert
from lapwan.lora.formats import write_lora
from lapwan.names import NoiseExpert

HIGH, LOW = NoiseExpert
BOTH = (HIGH, LOW)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """LoRAs that say high or low in their metadata, only in their name, not at all, and one that holds both."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "x_low", "plain", "double")}
    for name, metadata in (("a", {"lapwan.noise_expert": "high"}), ("b", {"lapwan.noise_expert": "low"}),
                           ("x_low", {}), ("plain", {})):
        write_lora(paths[name], random_state(shapes([0], ["self_attn.q"]), seed=len(name), metadata=metadata))
    entry = random_state(shapes([0], ["self_attn.q"])).entries["blocks.0.attn1.to_q"]
    parts = {"A": entry.down, "B": entry.up}
    save_file({f"transformer_{n}.blocks.0.attn1.to_q.lora_{part}.weight": tensor.clone()
               for n in (1, 2) for part, tensor in parts.items()}, paths["double"])
    return paths


@pytest.mark.parametrize(("role", "name", "wanted"), [
    ("high", "a", {HIGH}), ("low", "b", {LOW}), (None, "a", {HIGH}), (None, "b", {LOW}), (None, "x_low", {LOW}),
    ("high", "x_low", {HIGH}), ("both", "plain", {HIGH, LOW}), ("both", "a", {HIGH, LOW}), ("high", "plain", {HIGH}),
    (None, "double", {HIGH, LOW}), ("low", "double", {LOW}), ("both", "double", {HIGH, LOW}),
])
def test_two_noise_experts(files, role, name, wanted):
    found = assign([LoraRequest(role, files[name], 0.5)], BOTH)
    assert set(found) == wanted
    for noise_expert, [(lora, strength)] in found.items():
        assert lora.path == files[name] and strength == 0.5
        if name == "double":
            assert lora.noise_expert is noise_expert


@pytest.mark.parametrize(("role", "name", "says"), [
    ("high", "b", "is for the low noise expert"), ("low", "a", "give it as high=FILE"),
    (None, "plain", "give it as high=FILE, low=FILE, or both=FILE"),
])
def test_refused_on_two_noise_experts(files, role, name, says):
    with pytest.raises(UserError, match=says):
        assign([LoraRequest(role, files[name], 1.0)], BOTH)


def test_one_transformer_takes_what_does_not_say(files):
    assert set(assign([LoraRequest(None, files["plain"], 1.0)], [HIGH])) == {HIGH}
    with pytest.raises(UserError, match=r"is for the low noise expert, but .* here only has the high one"):
        assign([LoraRequest(None, files["b"], 1.0)], [HIGH])


@pytest.mark.parametrize(("requests", "named", "wanted"), [
    ([(None, "plain")], None, None), ([(None, "plain")], LOW, LOW), ([(None, "b")], None, LOW),
    ([("high", "plain")], LOW, HIGH), ([(None, "plain"), (None, "a")], None, HIGH), ([("both", "plain")], None, None),
])
def test_a_single_transformers_noise_expert(files, requests, named, wanted):
    noise_expert, loras = assign_to_transformer([LoraRequest(role, files[name], 1.0) for role, name in requests], named)
    assert noise_expert is wanted and len(loras) == len(requests)


@pytest.mark.parametrize(("requests", "named", "says"), [
    ([(None, "a"), (None, "b")], None, "are for both noise experts"),
    ([("high", "plain"), ("low", "plain")], None, "there is one transformer"),
    ([(None, "b")], HIGH, "is for the low noise expert"), ([("high", "b")], None, "is for the low noise expert"),
    ([(None, "double")], None, "are for both noise experts"),
])
def test_refused_on_a_single_transformer(files, requests, named, says):
    with pytest.raises(UserError, match=says):
        assign_to_transformer([LoraRequest(role, files[name], 1.0) for role, name in requests], named)


def test_sums_stay_within_a_noise_expert(files):
    def grouped(*requests: tuple[str | None, str]) -> dict:
        groups = group_by_noise_expert([LoraRequest(role, files[name], 1.0) for role, name in requests])
        return {e: len(loras) for e, loras in groups.items()}

    assert grouped((None, "plain")) == {None: 1}
    assert grouped((None, "plain"), (None, "a")) == {HIGH: 2}
    assert grouped(("high", "a"), ("low", "b")) == {HIGH: 1, LOW: 1}
    assert grouped(("both", "plain"), ("low", "b")) == {HIGH: 1, LOW: 2}
    assert grouped((None, "double")) == {HIGH: 1, LOW: 1}
    for bad in ([(None, "a"), (None, "b")], [(None, "double"), (None, "plain")], [(None, "double"), (None, "a")]):
        with pytest.raises(UserError):
            grouped(*bad)
