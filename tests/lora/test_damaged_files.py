"""Whatever is in a file, reading it ends in a LoRA or in one line for the user."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import random_state, shapes

from lapwan.errors import UserError
from lapwan.lora.formats import read_lora, write_lora

JSON = st.recursive(st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                    max_leaves=6)


def readable(path: Path) -> bool:
    try:
        states = read_lora(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return False
    assert all(state.entries for state in states.values())
    return True


def good_file(tmp_path: Path) -> tuple[dict, bytes]:
    path = tmp_path / "good.safetensors"
    if not path.exists():
        write_lora(path, random_state(shapes([0], ["self_attn.q", "ffn.0"])))
        assert readable(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_json_in_the_header(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    header, content = good_file(folder)
    name = data.draw(st.sampled_from(sorted(header)))
    where = data.draw(st.sampled_from(["entry", "dtype", "shape", "data_offsets", "whole", "name"]))
    if where == "whole":
        header = data.draw(JSON)
    elif where == "entry" or name == "__metadata__":
        header[name] = data.draw(JSON)
    elif where == "name":
        header[data.draw(st.text(max_size=6))] = header.pop(name)
    else:
        header[name][where] = data.draw(JSON | st.lists(st.integers(-50, 5000), min_size=2, max_size=2))
    readable(write(folder / "fuzz.safetensors", header, content))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 3000) | st.none())
def test_any_byte_of_the_file(tmp_path_factory, at, byte, cut):
    folder = tmp_path_factory.getbasetemp()
    good_file(folder)
    content = bytearray((folder / "good.safetensors").read_bytes())
    content[at] = byte
    (folder / "fuzz.safetensors").write_bytes(content[:cut])
    readable(folder / "fuzz.safetensors")


def test_an_alpha_that_is_no_finite_number_is_read_for_inspection_to_find(tmp_path):
    write_lora(tmp_path / "x.safetensors", random_state(shapes([0], ["self_attn.q"]), alpha=float("nan")))
    ((entry,),) = (state.entries.values() for state in read_lora(tmp_path / "x.safetensors").values())
    assert torch.tensor(entry.alpha).isnan()
