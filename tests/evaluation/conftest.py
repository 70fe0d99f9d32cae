from __future__ import annotations

from pathlib import Path

import pytest

from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.sampling.generator import Generator
from lapwan.tiny.dataset import write_dataset


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes of 32 x 32 pixels and 5 frames, one of each instrument."""
    return write_dataset(tmp_path_factory.mktemp("held_out"), 4, 3, (32, 32), 5, test_share=1.0)


@pytest.fixture(scope="session")
def t2v_generator(tiny_t2v: ModelSpec) -> Generator:
    """Loaded once; tests give it the adapters they want."""
    return Generator(Base(tiny_t2v), cache_conditions=True)
