"""What a preference-alignment run leaves: a LoRA file a noise expert, or a transformer folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lapwan.lora.formats import write_lora
from lapwan.models.base import Base
from lapwan.names import Band, NoiseExpert
from lapwan.settings.rewards import reward_weights
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.lora.objective import LORA_GROUP
from lapwan.train.parallel import is_sharded, whole
from lapwan.train.recipe import settings_hash
from lapwan.train.srpo.data import SrpoData
from lapwan.train.srpo.objective import AlignedNoiseExpert


class AlignedModelWriter:
    """Writes what is trained: a LoRA file a noise expert, or a transformer folder."""

    def __init__(self, settings: SrpoSettings, base: Base, data: SrpoData, trained: Mapping[NoiseExpert, AlignedNoiseExpert],
                 own: Mapping[NoiseExpert, Band]) -> None:
        self._settings, self._base, self._trained, self._own = settings, base, trained, own
        self._prompts = len(data.captions)
        self._gathered: dict[NoiseExpert, dict[str, Tensor]] = {}

    def gather(self) -> None:
        """Put sharded weights together, in every process, for the first one to write."""
        self._gathered = {
            noise_expert: {name: value.contiguous() for name, value in whole(dict(one.parameters)).items()}
            for noise_expert, one in self._trained.items() if any(is_sharded(p) for p in one.parameters.values())
        }

    def __call__(self, folder: Path, step: int) -> list[Path]:
        paths = []
        for noise_expert, one in self._trained.items():
            if one.adapter is None:
                path = folder / noise_expert.component
                self._write_transformer(path, noise_expert)
            else:
                path = folder / f"{self._settings.name}_{noise_expert.file_suffix}.safetensors"
                state = one.adapter.state(LORA_GROUP)
                state.metadata = {**self._metadata(noise_expert), "lapwan.step": str(step)}
                write_lora(path, state)
            paths.append(path)
        return paths

    def _write_transformer(self, path: Path, noise_expert: NoiseExpert) -> None:
        """A component's folder as diffusers writes it: its config, and the weights in files of at most 10 GB."""
        from huggingface_hub import save_torch_state_dict

        transformer = self._trained[noise_expert].transformer
        path.mkdir(parents=True)
        transformer.save_config(path)
        state = self._gathered.get(noise_expert) or dict(transformer.state_dict())
        save_torch_state_dict(state, path, filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
                              max_shard_size="10GB", metadata={"format": "pt"})

    def _metadata(self, noise_expert: NoiseExpert) -> dict[str, str]:
        band, base = self._own[noise_expert], self._base
        return {
            "lapwan.noise_expert": noise_expert.value, "lapwan.task": base.task,
            "lapwan.boundary": "" if base.spec.boundary is None else repr(base.spec.boundary),
            "lapwan.base_fingerprint": base.fingerprint(noise_expert), "lapwan.prompts": str(self._prompts),
            "lapwan.rewards": ", ".join(reward_weights(self._settings.rewards)),
            "lapwan.seed": str(self._settings.seed), "lapwan.settings": settings_hash(self._settings),
            "modelspec.timestep_range": f"{1000 * band.low:g},{1000 * band.high:g}",
            "modelspec.title": f"{self._settings.name}_{noise_expert.file_suffix}",
        }
