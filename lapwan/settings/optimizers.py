"""Optimizers: their settings and what each kind can do; lr schedules. No torch.

How to add an optimizer: a subclass of `OptimizerSettings` here, named in `OPTIMIZERS`, which says what it can do, and a
case of `lapwan.train.optimizers.build`, which makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Flag, Settings, type_of, union_of


class OptimizerSettings(Settings):
    """What a kind of optimizer can do. A kind adds its keys: `type`, a literal, and those that `describe` names.

    `gradient_powers`: the tensors of its state that change with the scale of the gradient, by the power of that scale,
    which alpha phases rescale; None: its state cannot be rescaled. `separate_lrs`: its groups may have different lrs.
    `takes_master_weights`: it can step fp32 or bf16 master weights, and keep its state on the CPU. `library`: the extra
    that it comes from. `own_schedule`: why an lr schedule has no effect on it.
    """

    gradient_powers: ClassVar[Mapping[str, int] | None] = None
    separate_lrs: ClassVar[bool] = True
    takes_master_weights: ClassVar[bool] = False
    library: ClassVar[str | None] = None
    own_schedule: ClassVar[str | None] = None

    @property
    def kind(self) -> str:
        """The type in the settings."""
        return type_of(type(self))

    @property
    def up_lr_scale(self) -> float:
        """LoRA+: the ratio of the lr of B to that of A."""
        return float(getattr(self, "lora_plus", 1.0))

    @property
    def largest_lr(self) -> float | None:
        """The largest lr that it can reach; None if that cannot be predicted."""
        return self.predicted_lr()

    def predicted_lr(self, agreement: float = 0.5) -> float | None:
        """The lr that a run settles at, if successive updates agree in sign with this probability; None: not known."""
        lr: float = getattr(self, "lr")  # noqa: B009 - a key of the kind
        return lr

    def describe(self) -> str:
        """Its lr, and betas and weight decay where they are not the default, for the plan of a run."""
        raise NotImplementedError

    def _with_changed(self, text: str, *names: str) -> str:
        """`text` and those of the fields that differ from their default, such as `, weight decay 0.1`."""
        fields = type(self).model_fields
        for name in names:
            if (value := getattr(self, name)) != fields[name].default:
                shown = ", ".join(f"{v:g}" for v in (value if isinstance(value, tuple) else (value,)))
                text += f", {name.replace('_', ' ')} {shown}"
        return text


class _LoraPlus(OptimizerSettings):
    lora_plus: float = Field(
        1.0, gt=0, description="LoRA+: ratio of the lr of B to that of A (arXiv 2402.12354); 1: the same lr.")


class AdamWSettings(_LoraPlus):
    """AdamW. Source: Loshchilov & Hutter (arXiv 1711.05101)."""

    gradient_powers: ClassVar[Mapping[str, int] | None] = {"exp_avg": 1, "exp_avg_sq": 2}
    takes_master_weights = True

    type: Literal["adamw"] = "adamw"
    lr: Annotated[float, Flag("--lr")] = Field(1e-4, gt=0, description="Learning rate.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)

    def describe(self) -> str:
        return self._with_changed(f"{self.kind} lr {self.lr:g}", "betas", "weight_decay")


class AdamW8bitSettings(_LoraPlus):
    """AdamW with 8-bit states, from bitsandbytes (an extra; GPU only)."""

    library = "bitsandbytes"

    type: Literal["adamw8bit"] = "adamw8bit"
    lr: Annotated[float, Flag("--lr")] = Field(1e-4, gt=0, description="Learning rate.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)

    def describe(self) -> str:
        return self._with_changed(f"{self.kind} lr {self.lr:g}", "betas", "weight_decay")


class AutomagicSettings(_LoraPlus):
    """Every element has its own lr, raised by `lr_bump` a step while its updates agree in sign, else lowered."""

    gradient_powers: ClassVar[Mapping[str, int] | None] = {"row": 2, "column": 2, "square": 2}
    own_schedule = "whose elements choose their own lr between min_lr and max_lr"

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

    @property
    def largest_lr(self) -> float | None:
        return self.max_lr

    def predicted_lr(self, agreement: float = 0.5) -> float:
        """The mean lr of an element whose successive updates agree in sign with probability p, independently.

        A random walk on min, min + bump, ..., max, up with probability p and held at the bounds: its share of time at
        the k-th value is proportional to (p / (1 − p))^k. At p = 0.5 the mean is (min + max) / 2 whatever the bump.
        """
        low, high = self.min_lr, self.max_lr
        count = max(1, round((high - low) / self.lr_bump))
        odds = agreement / (1 - agreement)
        weights = [odds ** (k - count if odds > 1 else k) for k in range(count + 1)]  # no overflow either way
        return low + (high - low) * sum(k * w for k, w in enumerate(weights)) / (count * sum(weights))

    def describe(self) -> str:
        text = (f"automagic, lr from {self.start_lr:g}, bump {self.lr_bump:g}, min {self.min_lr:g}, max "
                f"{self.max_lr:g}")
        return self._with_changed(text, "beta2", "clip_threshold", "weight_decay")


class ProdigySettings(OptimizerSettings):
    """Prodigy (an extra) estimates one step size for all parameters. Source: Mishchenko & Defazio, arXiv 2306.06101."""

    library = "prodigyopt"
    separate_lrs = False  # one step size for all, B of LoRA+ too

    type: Literal["prodigy"] = "prodigy"
    lr: Annotated[float, Flag("--lr")] = Field(1.0, gt=0, description="Multiplies the estimated step size.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    d0: float = Field(1e-6, gt=0, description="Initial estimate of the step size.")
    d_coef: float = Field(1.0, gt=0)

    def predicted_lr(self, agreement: float = 0.5) -> None:
        return None

    def describe(self) -> str:
        text = f"prodigy, lr {self.lr:g} times its own step size (from {self.d0:g})"
        return self._with_changed(text, "betas", "weight_decay")


OPTIMIZERS: tuple[type[OptimizerSettings], ...] = (
    AdamWSettings, AdamW8bitSettings, AutomagicSettings, ProdigySettings)


def kinds_that(can: str) -> list[str]:
    """The types of the optimizers that have a capability of `OptimizerSettings`, for messages."""
    return [type_of(kind) for kind in OPTIMIZERS if getattr(kind, can)]


def optimizer_of(settings: Sequence[type[OptimizerSettings]]) -> Any:
    """The annotation of a key that takes an optimizer of these kinds, by its `type`; AdamW where none is given."""
    return union_of(settings, type_of(AdamWSettings))


if TYPE_CHECKING:
    OptimizerChoice = OptimizerSettings
else:
    OptimizerChoice = optimizer_of(OPTIMIZERS)


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
