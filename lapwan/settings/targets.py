"""Which modules carry an adapter, and at which rank."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Settings

Blocks = Annotated[int, Field(ge=1)]


_RANKS = ("q", "k", "v", "o", "ffn_in")


def target_words(value: Any, both_ffn: bool = False) -> Any:
    """Short forms as the fields they stand for: `"last_8"` or `"all"` (attention and both FFN linears of those blocks),
    and in a table `recipe` (the same) and `rank` (of every projection that has none of its own).

    Args:
        both_ffn: `rank` without a recipe is the second FFN linear's too: what it is laid over trains that one.

    Raises:
        ValueError: no recipe of that name, or patterns beside it.
    """
    tree = {"recipe": value} if isinstance(value, str) else value
    if not isinstance(tree, dict) or not {"recipe", "rank"} & tree.keys():
        return value
    tree = dict(tree)
    recipe, rank = tree.pop("recipe", None), tree.pop("rank", None)
    if tree.get("patterns"):
        word = "recipe" if recipe is not None else "rank"
        raise ValueError(f"{word} and patterns both say what is trained; patterns carry their own ranks: leave {word} "
                         "out")
    words: dict[str, Any] = {}
    if recipe is not None:
        found = re.fullmatch(r"all|last_([1-9]\d*)", str(recipe))
        if found is None:
            raise ValueError(f"targets = '{recipe}' is no recipe; write 'last_8' (or another number), 'all', or a "
                             "table of ranks and blocks")
        blocks = int(found[1]) if found[1] else "all"
        words = {"patterns": {}, "last_blocks": blocks, "ffn_last_blocks": blocks, "ffn_out": 4}
    if rank is not None:
        words |= dict.fromkeys((*_RANKS, "ffn_out") if recipe is not None or both_ffn else _RANKS, rank)
    return words | tree


class TargetSettings(Settings):
    """The users' recipe: ranks for the last blocks' attention, and for the FFN of fewer blocks; rank 0 leaves out.

    `targets = "last_8"` and `targets = "all"` are short forms, see `target_words`.
    """

    patterns: dict[str, int] = Field(
        {}, description='Instead of the recipe: rank by pattern, such as {"blocks.*.self_attn.*" = 16}; a later one '
        "wins, rank 0 leaves out.")
    last_blocks: Blocks | Literal["all"] = Field(
        8, description="Attention of the last n blocks; \"all\" for every block.")
    attention: tuple[Literal["self_attn", "cross_attn"], ...] = ("self_attn", "cross_attn")
    q: int = Field(8, ge=0, description="Rank of the query projections.")
    k: int = Field(4, ge=0)
    v: int = Field(4, ge=0)
    o: int = Field(4, ge=0)
    ffn_last_blocks: Blocks | Literal["all"] = Field(
        3, description="FFN of the last n blocks; \"all\" for every block.")
    ffn_in: int = Field(4, ge=0, description="Rank of the first FFN linear.")
    ffn_out: int = Field(0, ge=0, description="Rank of the second FFN linear.")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return target_words(value)

    @model_validator(mode="after")
    def _ranks(self) -> TargetSettings:
        if bad := [f"'{pattern}' = {rank}" for pattern, rank in self.patterns.items() if rank < 0]:
            raise ValueError(f"a rank must be 0 or more, not {', '.join(bad)}")
        fields = type(self).model_fields
        beside = [name for name in fields if name != "patterns" and getattr(self, name) != fields[name].default]
        if self.patterns and beside:
            raise ValueError(f"patterns carry their own ranks and blocks, {beside[0]} = {getattr(self, beside[0])!r} "
                             "would do nothing beside them; leave one out")
        return self


def lay_over(shared: TargetSettings, own: Any) -> Any:
    """`shared` with what differs for one noise expert or family; patterns of its own stand instead of it all."""
    words = target_words(own, both_ffn=shared.ffn_out > 0)
    if not isinstance(words, dict) or words.get("patterns"):
        return words
    return {**shared.model_dump(), **words}
