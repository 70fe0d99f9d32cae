"""Fixtures every package's tests share: the embedded models and a small cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start: the workers fill the cores already

import pytest
import torch
from adapter_cases import write_random_mixture
from cache_cases import write_random_cache
from command_line import Ran, run_lapwan, run_successfully
from every_command import write_inputs
from one_transformer import write_ti2v

from lapwan.models.spec import ModelSpec, read_spec
from lapwan.tiny.model import tiny_folder

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what their module makes once run on one worker of xdist, which else makes it on each."""
    for item in items:
        made = item._fixtureinfo.name2fixturedefs.values()
        if any(definition.scope == "module" for definitions in made for definition in definitions[-1:]):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture(scope="session")
def tiny_t2v() -> ModelSpec:
    return read_spec(tiny_folder("t2v"))


@pytest.fixture(scope="session")
def tiny_i2v() -> ModelSpec:
    return read_spec(tiny_folder("i2v"))


@pytest.fixture(scope="session")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return write_ti2v(tmp_path_factory.mktemp("ti2v") / "model")


@pytest.fixture(scope="session")
def ti2v_cache(tmp_path_factory: pytest.TempPathFactory, ti2v: ModelSpec) -> Path:
    return write_random_cache(tmp_path_factory.mktemp("caches") / "ti2v", ti2v, size=(64, 96))


@pytest.fixture(scope="session")
def t2v_cache(tmp_path_factory: pytest.TempPathFactory, tiny_t2v: ModelSpec) -> Path:
    return write_random_cache(tmp_path_factory.mktemp("caches") / "t2v", tiny_t2v)


@pytest.fixture(scope="session")
def mixture_path(tmp_path_factory: pytest.TempPathFactory, tiny_t2v: ModelSpec) -> Path:
    return write_random_mixture(tmp_path_factory.mktemp("mixtures") / "mixture.safetensors", tiny_t2v)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, t2v_cache: Path, mixture_path: Path, tiny_t2v: ModelSpec,
           ) -> dict[str, Path]:
    """What the commands of `every_command` read."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), t2v_cache, mixture_path,
                        tiny_t2v.path / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def lapwan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run a command in a folder of its own: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return run_lapwan


@pytest.fixture
def succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """The same for a command whose exit code must be 0."""
    monkeypatch.chdir(tmp_path)
    return run_successfully


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_t2v: ModelSpec, tiny_i2v: ModelSpec) -> Path:
    """lapwan's cache folder for one test: only the embedded models are in it, which take a second to make."""
    folder = tmp_path / "lapwan_cache"
    folder.mkdir()
    for spec in (tiny_t2v, tiny_i2v):
        (folder / spec.path.name).symlink_to(spec.path)
    monkeypatch.setenv("LAPWAN_CACHE_DIR", str(folder))
    return folder
