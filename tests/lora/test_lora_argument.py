"""`[high=|low=|both=]PATH[:STRENGTH]`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lapwan.checkpoints.wan_keys import check_part, in_part
from lapwan.settings.lora_argument import LoraArgument

PATHS = st.text("abcXYZ 标本./_-=:0123456789", min_size=1).map(lambda text: str(Path(text))).filter(
    lambda text: text.strip() and "=" not in text.split("/")[0] and ":" not in text.split("/")[-1])


@given(PATHS, st.sampled_from([None, "high", "low", "both"]), st.floats(-4, 4) | st.none())
def test_what_is_written_is_read(path: str, role: str | None, strength: float | None):
    text = (f"{role}=" if role else "") + path + (f":{strength!r}" if strength is not None else "")
    read = LoraArgument.model_validate(text)
    assert (read.noise_expert, read.path, read.strength) == (role, Path(path), 1.0 if strength is None else strength)
    assert LoraArgument.model_validate(str(read)) == read


@pytest.mark.parametrize(("text", "expected"), [
    ("high=a.safetensors:0.8", ("high", "a.safetensors", 0.8)),
    ("/x/a=b.safetensors", (None, "/x/a=b.safetensors", 1.0)),
    ("run=3/a.safetensors:2", (None, "run=3/a.safetensors", 2.0)),
    ("low=c:d/e.safetensors", ("low", "c:d/e.safetensors", 1.0)),
    ("a.safetensors:-0.5", (None, "a.safetensors", -0.5)),
    ("out@2/a.safetensors:2", (None, "out@2/a.safetensors", 2.0)),
    ("a@ffn", (None, "a@ffn", 1.0)),
])
def test_examples(text: str, expected: tuple):
    read = LoraArgument.model_validate(text)
    assert (read.noise_expert, str(read.path), read.strength) == expected


@pytest.mark.parametrize(("text", "says"), [
    ("High=a.safetensors", "did you mean 'high'"), ("a.safetensors:strong", "'strong' is not a number"),
    ("a.safetensors:nan", "not a finite"), ("high=", "no file named"), ("", "no file named"), ("low=:0.5", "no file"),
])
def test_mistakes_are_named(text: str, says: str):
    with pytest.raises(ValidationError, match=says):
        LoraArgument.model_validate(text)


@pytest.mark.parametrize(("text", "expected"), [
    ("low=a.safetensors:0.8@blocks.20-39", ("low", "a.safetensors", 0.8, ("blocks.20-39",))),
    ("a.safetensors@attn1", (None, "a.safetensors", 1.0, ("attn1",))),
    ("folder:-1@blocks.3@self_attn.q", (None, "folder", -1.0, ("blocks.3", "self_attn.q"))),
])
def test_parts(text: str, expected: tuple):
    read = LoraArgument.model_validate(text)
    assert (read.noise_expert, str(read.path), read.strength, read.only) == expected
    assert LoraArgument.model_validate(str(read)) == read


def test_a_part_is_blocks_or_a_name_in_either_layout():
    target = "blocks.7.attn1.to_q"
    for part in ("blocks.7", "blocks.0-7", "attn1", "self_attn", "to_q", "q", "attn1.to_q", "self_attn.q"):
        check_part(part)
        assert in_part(target, part), part
    for part in ("blocks.8", "blocks.0-6", "attn2", "ffn", "k", "to_k", "self_attn.k", "blocks.70"):
        assert not in_part(target, part), part
    assert in_part("blocks.1.ffn.net.0.proj", "ffn.0") and in_part("blocks.1.ffn.net.2", "ffn")
    assert in_part("blocks.1.attn1.to_q.bias", "bias") and in_part("blocks.1.scale_shift_table", "modulation")
    assert in_part("proj_out", "head") and not in_part("proj_out", "blocks.0-39")


def test_a_table_reads_too():
    read = LoraArgument.model_validate({"noise_expert": "low", "path": "a", "strength": 0.5})
    assert read.path == Path("a")
    assert LoraArgument(expert="low", path=Path("a"), strength=0.5) == read  # the key's older name
    with pytest.raises(ValidationError, match="expert is the older name of noise_expert, and both are given"):
        LoraArgument.model_validate({"expert": "low", "noise_expert": "low", "path": "a"})
