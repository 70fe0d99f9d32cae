"""Stage 1: a plain LoRA on each noise expert, trained with flow matching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lapwan.caching.collate import Batch
from lapwan.lora.attach import Adapter
from lapwan.lora.dropout import Dropout, DropoutRates
from lapwan.lora.formats import write_both, write_lora
from lapwan.names import NoiseExpert
from lapwan.train.objective import Draws, Loss, Objective, ParameterGroup, flow_terms
from lapwan.wan.backbone import WanBackbone

LORA_GROUP = "lora"


class LoraObjective(Objective):
    """One adapter for each noise expert, which steps in its own turns only."""

    def __init__(
        self,
        backbones: Mapping[NoiseExpert, WanBackbone],
        adapters: Mapping[NoiseExpert, Adapter],
        metadata: Mapping[NoiseExpert, Mapping[str, str]],
        roi_weight: float = 0.0,
        empty_text: Tensor | None = None,
        dropout: Mapping[NoiseExpert, DropoutRates] | None = None,
        files: Sequence[str] = (),
    ) -> None:
        self.backbones, self.adapters = dict(backbones), dict(adapters)
        self._files, self._metadata = list(files), metadata
        self._roi_weight, self._empty_text = roi_weight, empty_text
        self._dropout = {e: Dropout((dropout or {}).get(e, DropoutRates()), a.layers) for e, a in adapters.items()}
        self.parameter_groups = {
            noise_expert.value: [
                ParameterGroup({f"{noise_expert.value}.{name}": p for name, p in adapter.parameters().items()})]
            for noise_expert, adapter in self.adapters.items()
        }

    @contextmanager
    def loss(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> Iterator[Loss]:
        """Forward, then (in the caller's block) backward, under the same dropout."""
        adapter = self.adapters[noise_expert]
        with self._dropout[noise_expert].scope(adapter.holder, draws.keys):
            yield flow_terms(self.backbones[noise_expert], batch, draws, self._roi_weight, self._empty_text)

    def save(self, folder: Path, step: int) -> list[Path]:
        states = {}
        for noise_expert, adapter in self.adapters.items():
            metadata = {**self._metadata[noise_expert], "lapwan.step": str(step), "ss_steps": str(step)}
            states[noise_expert] = replace(adapter.state(LORA_GROUP), metadata=metadata)
        paths = [folder / name for name in self._files]
        if len(paths) < len(states):
            write_both(paths[0], states)
        else:
            for path, state in zip(paths, states.values(), strict=True):
                write_lora(path, state)
        return paths
