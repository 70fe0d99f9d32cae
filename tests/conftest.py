"""Fixtures every package's tests share: the embedded models and a small cache."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start: the workers fill the cores already

import pytest
import torch
from cache_cases import write_random_cache

from lapwan.models.spec import ModelSpec, read_spec
from lapwan.tiny.model import tiny_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_t2v() -> ModelSpec:
    return read_spec(tiny_folder("t2v"))


@pytest.fixture(scope="session")
def tiny_i2v() -> ModelSpec:
    return read_spec(tiny_folder("i2v"))


@pytest.fixture(scope="session")
def t2v_cache(tmp_path_factory: pytest.TempPathFactory, tiny_t2v: ModelSpec) -> Path:
    return write_random_cache(tmp_path_factory.mktemp("caches") / "t2v", tiny_t2v)
