"""How to add a layout of adapter files, as `lapwan.checkpoints.lora_keys` says: one `AdapterLayout`, no other code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_cases import random_state, shapes
from safetensors.torch import load_file

from lapwan.checkpoints.lora_keys import LAYOUTS, AdapterLayout, Key
from lapwan.checkpoints.wan_keys import original_target, target_path
from lapwan.errors import UserError
from lapwan.lora.formats import open_lora, read_lora, write_lora
from lapwan.lora.kinds import FullDelta
from lapwan.lora.lycoris import LoHa, LoKr
from lapwan.lora.state import AdapterState, LowRank

# A tool that names the A of `blocks.0.ffn.0` `A@blocks/0/ffn/0`, and the delta of its bias `d@blocks/0/ffn/0:bias`.
LETTERS = {"A": "down", "B": "up", "s": "alpha", "d": "diff", "k1": "lokr_w1", "k2": "lokr_w2"}


def read(name: str) -> Key | None:
    letter, at, rest = name.partition("@")
    module, _, leaf = rest.replace("/", ".").partition(":")
    path = target_path(f"{module}.{leaf or 'weight'}")
    return Key(path, LETTERS[letter], None, "toy", None) if at and letter in LETTERS and path else None


def names(path: str, component: str | None) -> dict[str, str]:
    module, leaf = original_target(path)
    suffix = "" if leaf == "weight" else f":{leaf}"
    return {part: f"{letter}@{module.replace('.', '/')}{suffix}" for letter, part in LETTERS.items()}


TOY = LAYOUTS | {"toy": AdapterLayout(read, names)}


def mixed_state() -> AdapterState:
    state = random_state(shapes([0], ["self_attn.q", "ffn.0"]), rank=3, alpha=1.5)
    state.entries |= {
        "blocks.1.attn1.to_q": LoKr({"lokr_w1": torch.randn(4, 3), "lokr_w2": torch.randn(6, 8)}, None),
        "blocks.1.attn1.to_q.bias": FullDelta(torch.randn(24)),
        "blocks.1.scale_shift_table": FullDelta(torch.randn(1, 6, 24)),
    }
    return state


def test_a_layout_is_added_with_a_reader_and_a_writer(tmp_path: Path) -> None:
    state, path = mixed_state(), tmp_path / "toy.safetensors"
    write_lora(path, state, "toy", layouts=TOY)
    assert "A@blocks/0/ffn/0" in load_file(path) and "d@blocks/1:modulation" in load_file(path)
    (back,) = read_lora(path, TOY).values()
    assert back.entries.keys() == state.entries.keys() and back.fingerprint() == state.fingerprint()
    for module, update in state.entries.items():
        assert torch.equal(back.entries[module].delta(torch.float64), update.delta(torch.float64)), module
    write_lora(tmp_path / "comfy.safetensors", back)  # and so into every other layout
    (again,) = read_lora(tmp_path / "comfy.safetensors", TOY).values()
    assert again.fingerprint() == state.fingerprint()


def test_a_kind_the_new_layout_does_not_name_is_refused(tmp_path: Path) -> None:
    pairs = {part: torch.randn(2, 2) for part in LoHa.PARTS}
    with pytest.raises(UserError, match="is a LoHa, which this layout does not have"):
        write_lora(tmp_path / "x.safetensors", AdapterState({"blocks.0.attn1.to_q": LoHa(pairs, None)}), "toy",
                   layouts=TOY)


def test_its_files_are_detected_and_checked_like_all_others(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    write_lora(path, AdapterState({"blocks.0.attn1.to_q": LowRank(torch.ones(2, 6), torch.ones(6, 2), 2.0)}), "toy",
               layouts=TOY)
    with pytest.raises(UserError, match="is not a LoRA"):
        open_lora(path)  # without the layout
    (lora,) = open_lora(path, TOY).values()
    assert lora.modules["blocks.0.attn1.to_q"].shape == (6, 6)
