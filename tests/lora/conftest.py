"""The model folder and the LoRA files that the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from lora_cases import make_transformer, random_state, shapes

from lapwan.lora.formats import write_lora
from lapwan.names import NoiseExpert


@pytest.fixture(scope="session")
def transformers() -> dict[NoiseExpert, WanTransformer3DModel]:
    """The two noise experts; do not change them."""
    return {noise_expert: make_transformer(seed) for seed, noise_expert in enumerate(NoiseExpert)}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, transformers: dict) -> Path:
    """A diffusers folder with both transformers: `transformer` in one file, `transformer_2` in shards.

    The other components are files that a merge must carry over as they are; no test here decodes a video.
    """
    folder = tmp_path_factory.mktemp("model") / "base"
    index = {
        "_class_name": "WanPipeline", "_diffusers_version": "0.42.0", "boundary_ratio": 0.875,
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": [None, None], "text_encoder": [None, None], "tokenizer": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "expand_timesteps": False,
    }
    (folder / "vae").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae" / "config.json").write_text(json.dumps({"z_dim": 16}))
    (folder / "vae" / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "flow_shift": 12.0,
        "prediction_type": "flow_prediction", "use_flow_sigmas": True,
    }))
    for noise_expert, transformer in transformers.items():
        size = "20KB" if noise_expert is NoiseExpert.LOW else "1GB"
        transformer.save_pretrained(folder / noise_expert.component, max_shard_size=size)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write a random LoRA and give its path: saved("name.safetensors", seed=1, metadata={...}, layout="musubi")."""
    def save(name: str = "lora.safetensors", layout: str = "comfy", **random: object) -> Path:
        state = random_state(random.pop("sizes", shapes()), **random)
        write_lora(tmp_path / name, state, layout=layout)
        return tmp_path / name

    return save


@pytest.fixture
def pair(saved) -> dict[NoiseExpert, Path]:
    return {
        e: saved(f"m_{e.file_suffix}.safetensors", seed=n, alpha=2.0, metadata={"lapwan.noise_expert": e.value},
                 layout=layout)
        for n, (e, layout) in enumerate(zip(NoiseExpert, ("comfy", "musubi"), strict=True), 5)
    }
