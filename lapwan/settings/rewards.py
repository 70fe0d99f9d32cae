"""The rewards that score images, and their weights.

How to add a reward: see `lapwan.rewards.base`. Here it needs a class, its entry in `_Reward`, and a row in `_TYPES`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from lapwan.errors import nearest
from lapwan.settings.base import Settings

REWARD_METAVAR = "TYPE=PATH[:WEIGHT]"
Preprocess = Literal["pad", "squash", "crop"]
_PREPROCESS_HELP = (
    "How an image is made square. pad: resize the longest side and pad with black; squash: resize both sides; crop: "
    "resize the shortest side and crop the centre.")


class _Weighted(Settings):
    weight: float = Field(1.0, gt=0, description="Weight of this reward; the weights are divided by their sum.")
    name: str | None = Field(None, pattern=r"^\w+$", description="Name in logs; default: its type.")

    @property
    def label(self) -> str:
        """Its name in logs and metrics."""
        return self.name or str(getattr(self, "type"))  # noqa: B009 - every member of the union has one


class _Clip(_Weighted):
    tokenizer: Path | None = Field(None, description="Folder of a CLIP tokenizer, or bpe_simple_vocab_16e6.txt.gz; "
                                   "default: beside the weights.")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU.")


class HpsSettings(_Clip):
    """HPS v2.1 (Wu et al., arXiv 2306.09341): human preference, a fine-tuned ViT-H-14."""

    type: Literal["hps"] = "hps"
    path: Path = Field(description="HPS_v2.1_compressed.pt, or its folder.")
    preprocess: Preprocess = Field("pad", description=_PREPROCESS_HELP)


class ClipSettings(_Clip):
    """CLIP (Radford et al., arXiv 2103.00020): agreement of image and text."""

    type: Literal["clip"] = "clip"
    path: Path = Field(description="A transformers folder, such as CLIP-ViT-H-14-laion2B-s32B-b79K.")
    preprocess: Preprocess = Field("crop", description=_PREPROCESS_HELP)


class PickScoreSettings(_Clip):
    """PickScore (Kirstain et al., arXiv 2305.01569): human preference, a CLIPModel."""

    type: Literal["pickscore"] = "pickscore"
    path: Path = Field(description="A transformers folder: PickScore_v1.")
    preprocess: Preprocess = Field("crop", description=_PREPROCESS_HELP)


class TinyRewardSettings(_Weighted):
    """The embedded reward: the visible instrument, and light, colour and detail; needs no file."""

    type: Literal["tiny"] = "tiny"


_TYPES: dict[str, type[_Weighted]] = {
    "hps": HpsSettings, "clip": ClipSettings, "pickscore": PickScoreSettings, "tiny": TinyRewardSettings}


def split_reward(text: str) -> dict[str, Any]:
    """`hps=HPS_v2.1_compressed.pt:0.5` -> {"type": "hps", "path": "HPS_v2.1_compressed.pt", "weight": 0.5}.

    The number after the last colon is the weight; `tiny` needs no path.

    Raises:
        ValueError: an unknown type, or a missing path.
    """
    rest, colon, last = text.rpartition(":")
    weight = _number(last) if colon else None
    kind, equals, path = (rest if weight is not None else text).partition("=")
    if kind not in _TYPES:
        raise ValueError(f"unknown reward '{kind}'{nearest(kind.lower(), _TYPES)}; write hps=FILE, clip=FOLDER, "
                         "pickscore=FOLDER or tiny, each with :WEIGHT if it is not 1")
    if bool(path) == (kind == "tiny"):
        raise ValueError("tiny takes no path" if path else f"{kind} needs a path: {kind}=PATH")
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


def _from_text(value: Any) -> Any:
    if isinstance(value, str):
        return split_reward(value)
    if isinstance(value, dict) and value.get("type") not in _TYPES:
        raise ValueError(f"type = {value.get('type')!r}; a reward's type is one of {', '.join(_TYPES)}")
    return value


def _type(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


_Reward = Annotated[
    Annotated[HpsSettings, Tag("hps")] | Annotated[ClipSettings, Tag("clip")]
    | Annotated[PickScoreSettings, Tag("pickscore")] | Annotated[TinyRewardSettings, Tag("tiny")],
    Discriminator(_type),
]
RewardSettings = Annotated[_Reward, BeforeValidator(_from_text)]


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict | Settings) else value


def _distinct(value: tuple[_Weighted, ...]) -> tuple[_Weighted, ...]:
    if not value:
        raise ValueError("no reward; give at least one of hps=FILE, clip=FOLDER, pickscore=FOLDER, tiny")
    labels = [reward.label for reward in value]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"two rewards are called {twice[0]}; give one of them a name")
    return value


# One reward or several, as tables or as texts.
Rewards = Annotated[tuple[RewardSettings, ...], BeforeValidator(_as_list), AfterValidator(_distinct)]


def reward_weights(rewards: tuple[RewardSettings, ...]) -> dict[str, float]:
    """Weight by the reward's label."""
    return {reward.label: reward.weight for reward in rewards}
