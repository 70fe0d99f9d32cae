"""Optimizers and their lr schedules.

How to add an optimizer: a class here, in `OptimizerSettings`, and a case in `lapwan.train.optimizers.make_optimizer`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lapwan.settings.base import Flag, Settings


class _Optimizer(Settings):
    lora_plus: float = Field(
        1.0, gt=0, description="LoRA+: ratio of the lr of B to that of A (arXiv 2402.12354); 1: the same lr.")


class AdamWSettings(_Optimizer):
    """AdamW. Source: Loshchilov & Hutter (arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    lr: Annotated[float, Flag("--lr")] = Field(1e-4, gt=0, description="Learning rate.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class AdamW8bitSettings(_Optimizer):
    """AdamW with 8-bit states, from bitsandbytes (an extra; GPU only)."""

    type: Literal["adamw8bit"] = "adamw8bit"
    lr: Annotated[float, Flag("--lr")] = Field(1e-4, gt=0, description="Learning rate.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class AutomagicSettings(_Optimizer):
    """Every element has its own lr, raised by `lr_bump` a step while its updates agree in sign, else lowered."""

    type: Literal["automagic"] = "automagic"
    lr: Annotated[float | None, Flag("--lr")] = Field(
        None, gt=0, description="Initial lr of every element; absent: min_lr.")
    lr_bump: float = Field(5e-6, gt=0)
    min_lr: float = Field(5e-6, gt=0)
    max_lr: float = Field(1e-4, gt=0)
    beta2: float = Field(0.999, gt=0, lt=1)
    eps: float = Field(1e-30, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip_threshold: float = Field(1.0, gt=0, description="Largest root mean square of an update.")

    @model_validator(mode="after")
    def _bounds(self) -> AutomagicSettings:
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above max_lr = {self.max_lr:g}")
        if self.lr is not None and not self.min_lr <= self.lr <= self.max_lr:
            raise ValueError(f"lr = {self.lr:g} must lie in [min_lr, max_lr] = [{self.min_lr:g}, {self.max_lr:g}]")
        return self

    @property
    def start_lr(self) -> float:
        """The initial lr of every element."""
        return self.min_lr if self.lr is None else self.lr


class ProdigySettings(Settings):
    """Prodigy (an extra) estimates one step size for all parameters. Source: Mishchenko & Defazio, arXiv 2306.06101."""

    lora_plus: ClassVar[float] = 1.0  # one step size for all: B cannot have another

    type: Literal["prodigy"] = "prodigy"
    lr: Annotated[float, Flag("--lr")] = Field(1.0, gt=0, description="Multiplies the estimated step size.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    d0: float = Field(1e-6, gt=0, description="Initial estimate of the step size.")
    d_coef: float = Field(1.0, gt=0)


def _type(value: Any) -> str:
    return str(value.get("type", "adamw") if isinstance(value, dict) else getattr(value, "type", "adamw"))


OptimizerSettings = Annotated[
    Annotated[AdamWSettings, Tag("adamw")] | Annotated[AdamW8bitSettings, Tag("adamw8bit")]
    | Annotated[AutomagicSettings, Tag("automagic")] | Annotated[ProdigySettings, Tag("prodigy")],
    Discriminator(_type),
]


class ScheduleSettings(Settings):
    """The lr over the steps of each noise expert; the names are those of diffusers."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        "constant_with_warmup")
    warmup_steps: int = Field(0, ge=0)
    cycles: int = Field(1, ge=1, description="For cosine_with_restarts: number of cycles.")
    power: float = Field(1.0, gt=0, description="For polynomial: exponent.")

    @property
    def changes(self) -> bool:
        """False if the lr is constant."""
        return self.warmup_steps > 0 or not self.name.startswith("constant")


_FLAT_KEYS = ("lr_bump", "min_lr", "max_lr")


def nest_flat_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Move `high_noise_lr_bump`, `low_noise_max_lr` and so on, at the top or in [optimizer], to [high.optimizer] and
    [low.optimizer], and make the optimizer automagic if none is named."""
    tree = dict(tree)
    optimizer = dict(tree["optimizer"]) if isinstance(tree.get("optimizer"), dict) else {}
    any_flat = False
    for side in ("high", "low"):
        for key in _FLAT_KEYS:
            flat = f"{side}_noise_{key}"
            for holder in (tree, optimizer):
                if flat in holder:
                    any_flat = True
                    over = dict(tree.get(side) or {})
                    over["optimizer"] = {**(over.get("optimizer") or {}), key: holder.pop(flat)}
                    tree[side] = over
    if any_flat:
        for key in ("beta2", "weight_decay", "clip_threshold"):  # given at the top beside the flat keys
            if key in tree:
                optimizer[key] = tree.pop(key)
        tree["optimizer"] = {"type": "automagic", **optimizer}
    return tree
