"""The modules that get an adapter, and their ranks."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Settings

Blocks = Annotated[int, Field(ge=1)]

_RANKS = ("q", "k", "v", "o", "ffn_in")


def expand_recipe(value: Any, both_ffn: bool = False) -> Any:
    """Expand short forms to fields: `"last_8"` or `"all"` (attention and both FFN linears of those blocks), and in a
    table `recipe` (the same) and `rank` (of every projection without its own rank).

    Args:
        both_ffn: `rank` without a recipe also applies to the second FFN linear, because the shared targets train it.

    Raises:
        ValueError: an unknown recipe, or patterns given beside it.
    """
    tree = {"recipe": value} if isinstance(value, str) else value
    if not isinstance(tree, dict) or not {"recipe", "rank"} & tree.keys():
        return value
    tree = dict(tree)
    recipe, rank = tree.pop("recipe", None), tree.pop("rank", None)
    if tree.get("patterns"):
        word = "recipe" if recipe is not None else "rank"
        raise ValueError(f"{word} and patterns both set what is trained; patterns have their own ranks: leave {word} "
                         "out")
    fields: dict[str, Any] = {}
    if recipe is not None:
        match = re.fullmatch(r"all|last_([1-9]\d*)", str(recipe))
        if match is None:
            raise ValueError(f"targets = '{recipe}' is not a recipe; write 'last_8' (or another number), 'all', or a "
                             "table of ranks and blocks")
        blocks = int(match[1]) if match[1] else "all"
        fields = {"patterns": {}, "last_blocks": blocks, "ffn_last_blocks": blocks, "ffn_out": 4}
    if rank is not None:
        fields |= dict.fromkeys((*_RANKS, "ffn_out") if recipe is not None or both_ffn else _RANKS, rank)
    return fields | tree


class TargetSettings(Settings):
    """Ranks for the attention of the last blocks and for the FFN of fewer blocks; rank 0: no adapter.

    `targets = "last_8"` and `targets = "all"` are short forms, see `expand_recipe`.
    """

    patterns: dict[str, int] = Field(
        {}, description='Instead of all other keys: rank by pattern, such as {"blocks.*.self_attn.*" = 16}; the last '
        "match wins, rank 0: no adapter.")
    last_blocks: Blocks | Literal["all"] = Field(
        8, description="Adapt the attention of the last n blocks; \"all\": of every block.")
    attention: tuple[Literal["self_attn", "cross_attn"], ...] = ("self_attn", "cross_attn")
    q: int = Field(8, ge=0, description="Rank of the query projections; k, v and o: of the others.")
    k: int = Field(4, ge=0)
    v: int = Field(4, ge=0)
    o: int = Field(4, ge=0)
    ffn_last_blocks: Blocks | Literal["all"] = Field(
        3, description="Adapt the FFN of the last n blocks; \"all\": of every block.")
    ffn_in: int = Field(4, ge=0, description="Rank of the first FFN linear.")
    ffn_out: int = Field(0, ge=0, description="Rank of the second FFN linear.")

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        return expand_recipe(value)

    @model_validator(mode="after")
    def _ranks(self) -> TargetSettings:
        if bad := [f"'{pattern}' = {rank}" for pattern, rank in self.patterns.items() if rank < 0]:
            raise ValueError(f"a rank must be 0 or more, not {', '.join(bad)}")
        fields = type(self).model_fields
        beside = [name for name in fields if name != "patterns" and getattr(self, name) != fields[name].default]
        if self.patterns and beside:
            raise ValueError(f"patterns have their own ranks and blocks, so {beside[0]} = "
                             f"{getattr(self, beside[0])!r} has no effect; leave one of them out")
        return self


def override_targets(shared: TargetSettings, override: Any) -> Any:
    """`shared` with the fields that differ for one noise expert or family; patterns replace it as a whole."""
    fields = expand_recipe(override, both_ffn=shared.ffn_out > 0)
    if not isinstance(fields, dict) or fields.get("patterns"):
        return fields
    return {**shared.model_dump(), **fields}
