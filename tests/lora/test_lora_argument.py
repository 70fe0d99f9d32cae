"""`[high=|low=|both=]PATH[:STRENGTH]`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

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


def test_a_table_reads_too():
    read = LoraArgument.model_validate({"noise_expert": "low", "path": "a", "strength": 0.5})
    assert read.path == Path("a")
    assert LoraArgument(expert="low", path=Path("a"), strength=0.5) == read  # the key's older name
    with pytest.raises(ValidationError, match="expert is the older name of noise_expert, and both are given"):
        LoraArgument.model_validate({"expert": "low", "noise_expert": "low", "path": "a"})
