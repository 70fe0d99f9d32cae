"""What an adapter sits on: a model folder, or a model folder with LoRAs merged into it in memory.

Both have a fingerprint for each noise expert, and a merge in memory has the one of the merged folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lapwan.errors import UserError, nearest
from lapwan.lora.checkpoint_file import merged_rows
from lapwan.lora.fingerprint import merged_fingerprint
from lapwan.lora.formats import LoraFile
from lapwan.names import Band, NoiseExpert
from lapwan.wan.backbone import load_transformer
from lapwan.wan.folder import ModelSpec, Task

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class Base:
    """`loras` are merged at load: W + Σ strength·ΔW, accumulated in fp32 and rounded once."""

    spec: ModelSpec
    loras: Mapping[NoiseExpert, Sequence[tuple[LoraFile, float]]] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """t2v or i2v."""
        return self.spec.task

    @property
    def bands(self) -> Mapping[NoiseExpert, Band]:
        """Sigma band by noise expert."""
        return self.spec.bands

    @property
    def text_dim(self) -> int:
        """Width of the text features."""
        return self.spec.text_dim

    @property
    def num_layers(self) -> int:
        """Blocks of a transformer."""
        return self.spec.num_layers

    def fingerprint(self, expert: NoiseExpert) -> str:
        """Identity of a noise expert's weights with its LoRAs."""
        own = [(file.fingerprint(), strength) for file, strength in self.loras.get(expert, ())]
        return merged_fingerprint(self.spec.fingerprint(expert), own)

    def load(
        self, expert: NoiseExpert, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> WanTransformer3DModel:
        """The frozen transformer of a noise expert, with the LoRAs in its weights."""
        transformer = load_transformer(self.spec, expert, dtype, device)
        given = [(file.read(), strength, file.path) for file, strength in self.loras.get(expert, ())]
        weights = dict(transformer.named_parameters())
        for module in dict.fromkeys(path for state, _, _ in given for path in state.entries):
            weight = weights.get(f"{module}.weight")
            holders = [(state.entries[module], strength, path) for state, strength, path in given
                       if module in state.entries]
            if weight is None or any(tuple(weight.shape) != entry.shape for entry, _, _ in holders):
                raise UserError(f"{holders[0][2]} has module '{module}', which {self.spec.component(expert)} does not "
                                f"have in that shape{nearest(module, (n.removesuffix('.weight') for n in weights))}; "
                                "it was made for another model")
            merged = merged_rows(weight.detach().cpu(), [(entry, strength) for entry, strength, _ in holders])
            weight.data.copy_(merged)
        return transformer
