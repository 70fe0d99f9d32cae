from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_cases import random_mixture
from command_line import Ran

from lapwan.models.spec import ModelSpec
from lapwan.moe.mixture_file import write_mixture
from lapwan.sampling.request import Request, complete_guidance


@pytest.fixture(scope="session")
def t2v(tiny_t2v: ModelSpec) -> ModelSpec:
    return tiny_t2v


@pytest.fixture(scope="session")
def i2v(tiny_i2v: ModelSpec) -> ModelSpec:
    return tiny_i2v


@pytest.fixture
def mixture_file(t2v: ModelSpec, tmp_path: Path) -> Path:
    path = tmp_path / "mixture.safetensors"
    write_mixture(path, random_mixture(t2v))
    return path


@pytest.fixture
def small() -> Callable[..., Request]:
    """A request of 5 frames at 32x48 in 3 steps without guidance, changed by keywords."""

    def make(spec: ModelSpec, **changes: object) -> Request:
        base: dict[str, object] = {
            "prompt": "电凝钩切割组织", "num_frames": 5, "size": (32, 48), "steps": 3, "fps": 16,
            "guidance": complete_guidance(spec, 1.0),
        }
        guidance = changes.pop("guidance", 1.0)
        return Request(**{**base, **changes, "guidance": complete_guidance(spec, guidance)})  # type: ignore[arg-type]

    return make


@pytest.fixture
def unloaded(lapwan) -> Callable[..., Ran]:
    """`lapwan`, whose commands must end before a transformer, the text encoder or the VAE is read."""

    def run(*arguments: object, **how: object) -> Ran:
        ran = lapwan(*arguments, **how)
        assert "loading the" not in ran.err
        return ran

    return run
