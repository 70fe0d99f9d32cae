"""The target modules of an adapter: which Linears of a Wan transformer get a LoRA, and with which rank."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lapwan.checkpoints.wan_keys import PROJECTIONS, to_diffusers
from lapwan.errors import UserError, nearest


@dataclass(frozen=True)
class TargetRule:
    """Ranks by projection (`self_attn.q`, `ffn.0`, ...) for the last `last_blocks` blocks; None means all blocks."""

    last_blocks: int | None
    ranks: Mapping[str, int] = field(default_factory=dict)


def resolve_targets(rules: list[TargetRule], num_blocks: int) -> dict[str, int]:
    """Rank by module path, in model order; later rules override earlier ones, rank 0 removes a module.

    Args:
        rules: in order of precedence, the last one strongest.
        num_blocks: blocks of the model.

    Returns:
        Rank by diffusers' module path, such as `blocks.0.attn1.to_q`.

    Raises:
        UserError: an unknown projection, more blocks than the model has, or nothing left to train.
    """
    ranks: dict[str, int] = {}
    for rule in rules:
        count = num_blocks if rule.last_blocks is None else rule.last_blocks
        if count > num_blocks:
            raise UserError(f"targets name the last {count} blocks; this model has {num_blocks}; lower last_blocks")
        for projection, rank in rule.ranks.items():
            if projection not in PROJECTIONS:
                raise UserError(f"unknown projection '{projection}'{nearest(projection, PROJECTIONS)}; "
                                f"known: {', '.join(PROJECTIONS)}")
            for block in range(num_blocks - count, num_blocks):
                path = to_diffusers(f"blocks.{block}.{projection}")
                assert path is not None
                ranks[path] = rank
    order = {name: index for index, name in enumerate(PROJECTIONS.values())}
    chosen = {path: rank for path, rank in ranks.items() if rank > 0}
    if not chosen:
        raise UserError("no module is left to train: every rank of the targets is 0; give at least one a rank")

    def key(path: str) -> tuple[int, int]:
        _, block, inner = path.split(".", 2)
        return int(block), order[inner]

    return {path: chosen[path] for path in sorted(chosen, key=key)}


def resolve_patterns(patterns: Mapping[str, int], num_blocks: int) -> dict[str, int]:
    """Rank by module path from patterns such as `blocks.*.self_attn.q` or `*.ffn.0`, in model order.

    Patterns match names in either key layout; `*`, `?` and `[...]` as in a shell. Later patterns override earlier
    ones, rank 0 removes a module.

    Args:
        patterns: rank by pattern.
        num_blocks: blocks of the model.

    Returns:
        Rank by diffusers' module path, such as `blocks.0.attn1.to_q`.

    Raises:
        UserError: a pattern that no module matches, with the nearest ones, or nothing left to train.
    """
    originals = [f"blocks.{block}.{projection}" for block in range(num_blocks) for projection in PROJECTIONS]
    names = {original: str(to_diffusers(original)) for original in originals}
    ranks: dict[str, int] = {}
    for pattern, rank in patterns.items():
        matches = [path for pair in names.items() for path in pair[1:] if any(fnmatchcase(n, pattern) for n in pair)]
        if not matches:
            known = [*names, *names.values()]
            near = difflib.get_close_matches(pattern.replace("*", "0"), known, n=3, cutoff=0.4) or known[:3]
            raise UserError(f"targets.patterns: '{pattern}' matches no module of this model ({num_blocks} blocks); "
                            f"near are {', '.join(near)}")
        ranks |= dict.fromkeys(matches, rank)
    chosen = {path: ranks[path] for path in names.values() if ranks.get(path, 0) > 0}
    if not chosen:
        raise UserError("no module is left to train: every rank of targets.patterns is 0; give at least one a rank")
    return chosen
