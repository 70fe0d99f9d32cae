"""The rewards that score images, and their weights.

How to add a reward: see `lapwan.rewards.base`. Here it is a subclass of `RewardSettings`, named in `REWARDS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from lapwan.errors import nearest
from lapwan.settings.base import Settings, type_of, union_of

REWARD_METAVAR = "TYPE=PATH[:WEIGHT]"
Preprocess = Literal["pad", "squash", "crop"]
_PREPROCESS_HELP = (
    "How an image is made square. pad: resize the longest side and pad with black; squash: resize both sides; crop: "
    "resize the shortest side and crop the centre.")


class RewardSettings(Settings):
    """What all rewards have. A kind adds `type`, a literal, and `path` if it has weights.

    `example` is how it is written on the command line, without its weight.
    """

    example: ClassVar[str]

    weight: float = Field(1.0, gt=0, description="Weight of this reward; the weights are divided by their sum.")
    name: str | None = Field(None, pattern=r"^\w+$", description="Name in logs; default: its type.")

    @property
    def label(self) -> str:
        """Its name in logs and metrics."""
        return self.name or type_of(type(self))


class _Clip(RewardSettings):
    tokenizer: Path | None = Field(None, description="Folder of a CLIP tokenizer, or bpe_simple_vocab_16e6.txt.gz; "
                                   "default: beside the weights.")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU.")


class HpsSettings(_Clip):
    """HPS v2.1 (Wu et al., arXiv 2306.09341): human preference, a fine-tuned ViT-H-14."""

    example = "hps=FILE"

    type: Literal["hps"] = "hps"
    path: Path = Field(description="HPS_v2.1_compressed.pt, or its folder.")
    preprocess: Preprocess = Field("pad", description=_PREPROCESS_HELP)


class ClipSettings(_Clip):
    """CLIP (Radford et al., arXiv 2103.00020): agreement of image and text."""

    example = "clip=FOLDER"

    type: Literal["clip"] = "clip"
    path: Path = Field(description="A transformers folder, such as CLIP-ViT-H-14-laion2B-s32B-b79K.")
    preprocess: Preprocess = Field("crop", description=_PREPROCESS_HELP)


class PickScoreSettings(_Clip):
    """PickScore (Kirstain et al., arXiv 2305.01569): human preference, a CLIPModel."""

    example = "pickscore=FOLDER"

    type: Literal["pickscore"] = "pickscore"
    path: Path = Field(description="A transformers folder: PickScore_v1.")
    preprocess: Preprocess = Field("crop", description=_PREPROCESS_HELP)


class TinyRewardSettings(RewardSettings):
    """The embedded reward: the visible instrument, and light, colour and detail; needs no file."""

    example = "tiny"

    type: Literal["tiny"] = "tiny"


REWARDS: tuple[type[RewardSettings], ...] = (HpsSettings, ClipSettings, PickScoreSettings, TinyRewardSettings)
REWARD_EXAMPLES = tuple(kind.example for kind in REWARDS)


def _split(text: str, kinds: dict[str, type[RewardSettings]]) -> dict[str, Any]:
    """`hps=HPS_v2.1_compressed.pt:0.5` -> {"type": "hps", "path": "HPS_v2.1_compressed.pt", "weight": 0.5}.

    The number after the last colon is the weight.

    Raises:
        ValueError: an unknown type, or a path that is missing or not taken.
    """
    rest, colon, last = text.rpartition(":")
    weight = _number(last) if colon else None
    kind, equals, path = (rest if weight is not None else text).partition("=")
    if kind not in kinds:
        *first, final = [settings.example for settings in kinds.values()]
        raise ValueError(f"unknown reward '{kind}'{nearest(kind.lower(), kinds)}; write {', '.join(first)} or {final}, "
                         "each with :WEIGHT if it is not 1")
    if bool(path) != ("path" in kinds[kind].model_fields):
        raise ValueError(f"{kind} takes no path" if path else f"{kind} needs a path: {kind}=PATH")
    parts: dict[str, Any] = {"type": kind}
    if equals:
        parts["path"] = path
    return parts if weight is None else {**parts, "weight": weight}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def rewards_of(settings: Sequence[type[RewardSettings]]) -> Any:
    """The annotation of a key that takes one reward or several of these kinds, as tables or as texts."""
    kinds = {type_of(kind): kind for kind in settings}

    def from_text(value: Any) -> Any:
        if isinstance(value, str):
            return _split(value, kinds)
        if isinstance(value, dict) and value.get("type") not in kinds:
            raise ValueError(f"type = {value.get('type')!r}; a reward's type is one of {', '.join(kinds)}")
        return value

    def distinct(value: tuple[RewardSettings, ...]) -> tuple[RewardSettings, ...]:
        if not value:
            examples = ", ".join(kind.example for kind in kinds.values())
            raise ValueError(f"no reward is given; give at least one of {examples}")
        labels = [reward.label for reward in value]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two rewards are called {twice[0]}; give one of them a name")
        return value

    reward: Any = Annotated[union_of(settings), BeforeValidator(from_text)]
    return Annotated[tuple[reward, ...], BeforeValidator(_as_list), AfterValidator(distinct)]


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict | Settings) else value


if TYPE_CHECKING:
    Rewards = tuple[RewardSettings, ...]
else:
    Rewards = rewards_of(REWARDS)


def reward_weights(rewards: Sequence[RewardSettings]) -> dict[str, float]:
    """Weight by the reward's label."""
    return {reward.label: reward.weight for reward in rewards}
