"""The model an adapter is attached to: a model folder, or one with LoRAs merged into it in memory.

Each noise expert has a fingerprint; a merge in memory has that of the merged folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lapwan.checkpoints.fingerprints import merged_fingerprint
from lapwan.checkpoints.rewrite import merged_tensor
from lapwan.checkpoints.wan_keys import parameter_name
from lapwan.files import cache_root
from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.assign import LoraRequest, assign, report
from lapwan.lora.merge import plan_terms, target_tensors
from lapwan.lora.noise_expert import NOISE_EXPERT_KEY
from lapwan.lora.targets import TargetRule, resolve_patterns, resolve_targets
from lapwan.models.resolve import check_task, check_weights, resolve
from lapwan.models.separate_files import make_folder
from lapwan.models.spec import ModelSpec, Task, read_spec, weight_files
from lapwan.names import Band, NoiseExpert
from lapwan.settings.model import BaseModelSettings, ModelFilesSettings
from lapwan.settings.targets import TargetSettings
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.quantise.load import Move, Recipe, load_quantised_transformer
from lapwan.wan.transformer.forward import ForwardOptions


@dataclass(frozen=True)
class Base:
    """A model folder and the LoRAs to merge at load: W + Σ strength·ΔW, accumulated in fp64 and rounded once to the
    checkpoint's dtype, bit for bit as in a merged folder."""

    spec: ModelSpec
    loras: Mapping[NoiseExpert, Sequence[tuple[AdapterFile, float]]] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The name of the model's task in caches, mixtures and metadata."""
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

    def fingerprint(self, noise_expert: NoiseExpert) -> str:
        """Identity of a noise expert's weights with its LoRAs."""
        loras = [(file.finite_fingerprint(), strength) for file, strength in self.loras.get(noise_expert, ())]
        return merged_fingerprint(self.spec.fingerprint(noise_expert), loras)

    def metadata(self, noise_expert: NoiseExpert) -> dict[str, str]:
        """What an adapter file says about the noise expert it was trained on."""
        boundary = self.spec.boundary
        which = {NOISE_EXPERT_KEY: noise_expert.value}
        if self.spec.one_transformer:
            which = {"lapwan.model": self.spec.family.title}
        return {
            **which, "lapwan.task": self.task, "lapwan.boundary": "" if boundary is None else repr(boundary),
            "lapwan.base_fingerprint": self.fingerprint(noise_expert),
        }

    def load(
        self, noise_expert: NoiseExpert, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
        recipe: Recipe | None = None, work_on: str | torch.device | None = None, options: ForwardOptions | None = None,
        to_host: Move | None = None,
    ) -> WanBackbone:
        """A noise expert with a frozen transformer, the LoRAs in its weights.

        Args:
            recipe: quantise the blocks' Linears, after the merge.
            work_on: device that quantises; None: `device`.
            to_host: copies quantised weights into the host memory that keeps them; None: moved to `device`.
            options: how its forward runs.

        Raises:
            UserError: a LoRA made for another model, or a merge that `lapwan merge` would refuse.
        """
        merged = self.merged_weights(noise_expert)
        if recipe is not None:
            transformer = load_quantised_transformer(
                self.spec, noise_expert, recipe, self.fingerprint(noise_expert), dtype, device, merged, work_on,
                to_host)
            return WanBackbone(transformer, options)
        transformer = load_transformer(self.spec, noise_expert, dtype, device)
        for name, weight in merged.items():
            transformer.get_parameter(name).data.copy_(weight())
        return WanBackbone(transformer, options)

    def merged_weights(self, noise_expert: NoiseExpert) -> dict[str, Callable[[], Tensor]]:
        """Weights that the LoRAs change, by parameter name: each is read and merged when its function is called."""
        loras = self.loras.get(noise_expert, ())
        if not loras:
            return {}
        files, terms = plan_terms(weight_files(self.spec.component(noise_expert)), loras)
        return {
            parameter_name(path): partial(merged_tensor, files[index], name, terms[index][name])
            for path, (index, name) in target_tensors(files).items() if name in terms[index]
        }


def target_ranks(settings: TargetSettings, num_blocks: int) -> dict[str, int]:
    """Rank by module path of the targets in the settings.

    Raises:
        UserError: more blocks than the model has, a pattern that matches nothing, or nothing to train.
    """
    if settings.patterns:
        return resolve_patterns(settings.patterns, num_blocks)
    attention = {
        f"{kind}.{part}": getattr(settings, part) for kind in settings.attention for part in ("q", "k", "v", "o")
    }
    # The defaults are for a model of 40 blocks; in a smaller model all blocks are trained.
    clip = {name: None if n == "all" else min(n, num_blocks) for name, n in
            (("attention", settings.last_blocks), ("ffn", settings.ffn_last_blocks))}
    rules = [
        TargetRule(clip["attention"], attention),
        TargetRule(clip["ffn"], {"ffn.0": settings.ffn_in, "ffn.2": settings.ffn_out}),
    ]
    return resolve_targets(rules, num_blocks)


def resolve_base(
    model: str | BaseModelSettings | ModelFilesSettings, task: Task | None = None
) -> Base:
    """The base of MODEL, of `{model, lora, multiplier}` (LoRAs merged in memory), or of separate files.

    Raises:
        UserError: no such model or LoRA, or a LoRA for the other noise expert.
    """
    if isinstance(model, str):
        return Base(resolve(model, task))
    if isinstance(model, ModelFilesSettings):
        files_spec = _from_files(model)
        check_task(files_spec, next(iter(model.transformers.values())), task)
        return Base(files_spec)
    spec = resolve(model.model, task)
    requests = [LoraRequest(noise_expert.value, path, model.multiplier) for noise_expert, path in model.lora.items()]
    assigned = assign(requests, spec.noise_experts, model.key_rule, spec.one_transformer)
    report(file for files in assigned.values() for file, _ in files)
    for noise_expert, files in assigned.items():
        for file, _ in files:
            plan_terms(weight_files(spec.component(noise_expert)), [(file, 1.0)])
            file.check_finite()
    return Base(spec, assigned)


def _from_files(files: ModelFilesSettings) -> ModelSpec:
    spec = read_spec(make_folder(
        cache_root(), files.transformers, files.vae, files.text_encoder, files.tokenizer, files.boundary,
        files.flow_shift))
    check_weights(spec)
    return spec
