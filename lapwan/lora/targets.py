"""Which Linears of a Wan transformer carry an adapter, and at which rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lapwan.errors import UserError, nearest
from lapwan.names import PROJECTIONS, to_diffusers


@dataclass(frozen=True)
class TargetRule:
    """Ranks by projection (`self_attn.q`, `ffn.0`, ...) for the last `last_blocks` blocks; None means all blocks."""

    last_blocks: int | None
    ranks: Mapping[str, int] = field(default_factory=dict)


def resolve_targets(rules: list[TargetRule], num_blocks: int) -> dict[str, int]:
    """Rank by module path, in model order; a later rule wins over an earlier one, rank 0 removes a module.

    Raises:
        UserError: an unknown projection, more blocks than the model has, or nothing left to train.
    """
    found: dict[str, int] = {}
    for rule in rules:
        count = num_blocks if rule.last_blocks is None else rule.last_blocks
        if count > num_blocks:
            raise UserError(f"targets ask for the last {count} blocks; this model has {num_blocks}; lower last_blocks")
        for projection, rank in rule.ranks.items():
            if projection not in PROJECTIONS:
                raise UserError(f"unknown projection '{projection}'{nearest(projection, PROJECTIONS)}; "
                                f"known: {', '.join(PROJECTIONS)}")
            for block in range(num_blocks - count, num_blocks):
                path = to_diffusers(f"blocks.{block}.{projection}")
                assert path is not None
                found[path] = rank
    order = {name: index for index, name in enumerate(PROJECTIONS.values())}
    chosen = {path: rank for path, rank in found.items() if rank > 0}
    if not chosen:
        raise UserError("no module is left to train: every rank of the targets is 0; give at least one a rank")

    def key(path: str) -> tuple[int, int]:
        _, block, inner = path.split(".", 2)
        return int(block), order[inner]

    return {path: chosen[path] for path in sorted(chosen, key=key)}
