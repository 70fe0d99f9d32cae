"""Trainers built as the commands build them, on the embedded model and a small cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapwan.data.taxonomy import load_taxonomy
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train import recipe
from lapwan.train.lora import recipe as lora_recipe
from lapwan.train.moe import recipe as moe_recipe
from lapwan.train.trainer import Trainer

SMALL = {"targets": {"last_blocks": 2, "ffn_last_blocks": 1}, "steps": 4, "turn": 1, "model": "tiny"}


@pytest.fixture
def make_lora(tmp_path: Path, t2v_cache: Path) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        settings = TrainLoraSettings.model_validate(
            {**SMALL, "output": tmp_path / "run", "data": {"cache": t2v_cache}, **changes})
        base = resolve_base(settings.model)
        return lora_recipe.prepare(settings, base, recipe.read_data(settings, base), torch.device("cpu"))
    return make


@pytest.fixture
def make_moe(tmp_path: Path, t2v_cache: Path) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        settings = TrainMoeSettings.model_validate(
            {**SMALL, "output": tmp_path / "run", "data": {"cache": t2v_cache}, **changes})
        base = resolve_base(settings.model)
        data = recipe.read_data(settings, base)
        taxonomy = load_taxonomy(settings.taxonomy)
        return moe_recipe.prepare(settings, base, data, taxonomy, torch.device("cpu"))
    return make
