"""Attach stacked low-rank layers to a transformer, read their state, and detach them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lapwan import rng
from lapwan.errors import UserError, nearest
from lapwan.lora.layer import FrozenLinear, GateHolder, LayerGroup, StackedLoraLinear
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate


@dataclass(frozen=True)
class Group:
    """A LoRA attached to a transformer; its index in the list of groups is its column in the gates."""

    name: str
    state: AdapterState
    trainable: bool


def initial_state(
    transformer: nn.Module, ranks: Mapping[str, int], alpha: float | None, *key: int | str
) -> AdapterState:
    """A fresh LoRA: down ~ U(−1/√I, 1/√I) (Kaiming-uniform, a = √5), up = 0, so ΔW = 0.

    Args:
        transformer: has the Linears; not changed.
        ranks: by module path.
        alpha: None for each module's rank (scale 1).
        key: seeds the draws together with the module's path, so they do not depend on the other modules.

    Returns:
        A down [r, I] and an up [O, r] per module, fp32.

    Raises:
        UserError: a module that the transformer lacks.
    """
    entries: dict[str, WeightUpdate] = {}
    linears = _linears(transformer)
    for path, rank in ranks.items():
        base = _linear_at(linears, path)
        bound = 1.0 / math.sqrt(base.in_features)
        uniform = torch.rand(rank, base.in_features, generator=rng.generator(*key, path, "down"))
        entries[path] = LowRank(
            down=(2 * uniform - 1) * bound, up=torch.zeros(base.out_features, rank),
            alpha=float(rank if alpha is None else alpha),
        )
    return AdapterState(entries, {})


def _linears(transformer: nn.Module) -> dict[str, nn.Linear | FrozenLinear]:
    linears: dict[str, nn.Linear | FrozenLinear] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, StackedLoraLinear):
            raise RuntimeError(f"the transformer already has an adapter (at {name}); detach it first")
        if isinstance(module, nn.Linear | FrozenLinear):
            linears[name] = module
    return linears


def _linear_at(linears: Mapping[str, nn.Linear | FrozenLinear], path: str) -> nn.Linear | FrozenLinear:
    if path not in linears:
        raise UserError(f"the adapter has module '{path}', which this model does not have{nearest(path, linears)}; "
                        "it was made for another model")
    return linears[path]


class Adapter:
    """The stacked layers in one noise expert's transformer, and the holder of their gates.

    Args:
        transformer: the model, whose Linears were replaced by `layers`.
        groups: the LoRAs, in the order of their gates.
        layers: stacked layers by path.
        holder: the gates that all layers read.
    """

    def __init__(
        self, transformer: nn.Module, groups: Sequence[Group], layers: dict[str, StackedLoraLinear], holder: GateHolder
    ) -> None:
        self.transformer, self.layers, self.holder = transformer, layers, holder
        self.group_names = tuple(group.name for group in groups)
        self._metadata = {group.name: dict(group.state.metadata) for group in groups}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable tensor, by `path.down` and `path.up`."""
        trainable = {}
        for path, layer in self.layers.items():
            if layer.down_RI.requires_grad:
                trainable[f"{path}.down"] = layer.down_RI
                trainable[f"{path}.up"] = layer.up_OR
        return trainable

    def adapter_tensors(self) -> list[Tensor]:
        """Parameters and buffers of the stacked layers, without the base's weights."""
        return [t for layer in self.layers.values()
                for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]

    def state(self, group: str) -> AdapterState:
        """A copy of one group's tensors, on the CPU."""
        column = self.group_names.index(group)
        entries: dict[str, WeightUpdate] = {}
        for path, layer in self.layers.items():
            part = next((g for g in layer.groups if g.column == column), None)
            if part is not None:
                down, up = layer.rows(column)
                entries[path] = LowRank(_cpu(down), _cpu(up), part.alpha)
        return AdapterState(entries, dict(self._metadata[group]))

    def detach(self) -> None:
        """Restore the base Linears."""
        for path, layer in self.layers.items():
            self.transformer.set_submodule(path, layer.base)
        self.layers.clear()


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def attach(transformer: nn.Module, groups: Sequence[Group], gates_required: bool = False) -> Adapter:
    """Freeze the transformer, then stack the groups' low-rank layers over its Linears.

    Freezing comes first: a `requires_grad_(False)` over the transformer after attaching would freeze the adapter too.
    Without gates every group acts with gate 1; set gates with `adapter.holder.scope(gates_BG)`.

    Args:
        transformer: changed in place.
        groups: the LoRAs; the order is that of the gates' columns.
        gates_required: a forward without gates raises.

    Raises:
        UserError: a module the model does not have, a shape that does not fit it, or no low-rank pair.
    """
    entries = [group.state.low_rank(f"'{group.name}' cannot act beside the weights") for group in groups]
    transformer.requires_grad_(False)
    linears = _linears(transformer)
    holder = GateHolder(required=gates_required)
    layers: dict[str, StackedLoraLinear] = {}
    paths = dict.fromkeys(path for group_entries in entries for path in group_entries)
    for path in paths:
        base = _linear_at(linears, path)
        parts = []
        for column, group in enumerate(groups):
            entry = entries[column].get(path)
            if entry is None:
                continue
            if entry.down.shape[1] != base.in_features or entry.up.shape[0] != base.out_features:
                raise UserError(
                    f"'{group.name}' at {path} maps {entry.down.shape[1]} -> {entry.up.shape[0]} features, but the "
                    f"model's layer maps {base.in_features} -> {base.out_features}; it was made for another model"
                )
            parts.append(LayerGroup(column, entry.down, entry.up, entry.alpha, group.trainable))
        layers[path] = StackedLoraLinear(base, parts, holder)
    for path, layer in layers.items():
        transformer.set_submodule(path, layer)
    return Adapter(transformer, groups, layers, holder)


@torch.no_grad()
def set_alpha(adapter: Adapter, alpha: float) -> None:
    """Set alpha of every trainable group; B is unchanged, so ΔW scales with alpha.

    Args:
        adapter: the stacked layers of one transformer.
        alpha: the new alpha; ΔW = alpha / r · B A.
    """
    for layer in adapter.layers.values():
        layer.groups = [replace(g, alpha=alpha) if g.trainable else g for g in layer.groups]
        scale = torch.tensor([g.alpha / g.down_RI.shape[0] for g in layer.groups], dtype=torch.float64)
        ranks = torch.tensor([g.down_RI.shape[0] for g in layer.groups])
        layer.scale_R.copy_(scale.repeat_interleave(ranks))
