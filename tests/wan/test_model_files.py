"""The JSON files of a model folder: whatever a value is, the model is read or the file and the key are named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lapwan.errors import UserError
from lapwan.models.configs import component_config
from lapwan.models.spec import ModelSpec, read_spec

FILES = ("model_index.json", "transformer/config.json", "transformer_2/config.json", "vae/config.json",
         "text_encoder/config.json", "scheduler/scheduler_config.json", "lapwan.json")
WRONG = (None, True, -1, 0, 1.5, 10**30, "text\n\x1b[31m", [], [1, [2]], {}, {"a": 1}, float("nan"))


@pytest.fixture
def model(tiny_t2v: ModelSpec, tmp_path: Path) -> Path:
    shutil.copytree(tiny_t2v.path, tmp_path / "model")
    return tmp_path / "model"


def read(model: Path) -> None:
    spec = read_spec(model)
    for component in ("vae", "text_encoder", *(e.component for e in spec.noise_experts)):
        component_config(model / component)


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_value_is_named_or_taken(name: str, model: Path) -> None:
    file, random_ = model / name, random.Random(name)
    good: dict[str, Any] = json.loads(file.read_text())
    read(model)
    refused = 0
    for key in good:
        for wrong in (*WRONG, ...):
            changed = {other: value for other, value in good.items() if other != key or wrong is not ...}
            if wrong is not ...:
                in_list = isinstance(good[key], list) and wrong is None
                changed[key] = [wrong] * random_.randint(1, 3) if in_list else wrong
            file.write_text(json.dumps(changed))
            try:
                read(model)
            except UserError as error:
                refused += 1
                assert str(error).isprintable() and len(str(error)) < 600, str(error)
                assert str(file) in str(error) or str(model) in str(error), str(error)
    assert refused > 5
    for content in (b"", b"[]", b"\0", b'{"a":' * 3000, json.dumps(good).encode("utf-16")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=name.rpartition("/")[2]):
            read(model)


@pytest.mark.parametrize(("name", "key", "value", "message"), [
    ("transformer/config.json", "num_layers", "2", "num_layers = '2': must be a whole number"),
    ("transformer/config.json", "patch_size", [1, 2], "patch_size = a list: must hold at least 3, has 2"),
    ("vae/config.json", "latents_mean", [0.0], "latents_mean has 1 values, but z_dim is 16"),
    ("model_index.json", "boundary_ratio", 7, "boundary_ratio = 7: must be less than 1"),
    ("lapwan.json", "size", [480], "size = a list: must hold at least 2, has 1"),
    ("scheduler/scheduler_config.json", "flow_shift", True, "flow_shift = True: must be a number"),
])
def test_the_line_names_file_key_and_value(name: str, key: str, value: object, message: str, model: Path) -> None:
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError) as caught:
        read(model)
    assert str(caught.value).startswith(f"{model / name}: {message}")
