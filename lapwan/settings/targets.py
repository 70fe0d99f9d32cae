"""Which modules carry an adapter, and at which rank."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Settings

Blocks = Annotated[int, Field(ge=1)]


class TargetSettings(Settings):
    """The users' recipe: ranks for the last blocks' attention, and for the FFN of fewer blocks; rank 0 leaves out."""

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

    @model_validator(mode="after")
    def _ranks(self) -> TargetSettings:
        if bad := [f"'{pattern}' = {rank}" for pattern, rank in self.patterns.items() if rank < 0]:
            raise ValueError(f"a rank must be 0 or more, not {', '.join(bad)}")
        return self
