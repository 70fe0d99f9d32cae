"""What the comparison compares, on what, and how it is judged: fixed before the first mixture is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Settings

TaskName = Literal["t2v", "i2v"]
MIXTURE, CONTINUED, SAME_SIZE, NONE = "mixture", "plain, continued", "plain, same size", "none"


class ClipCounts(Settings):
    """Synthetic surgical scenes: to train on, to choose the lr by, and to report."""

    train: int = Field(160, ge=4)
    validation: int = Field(96, ge=1)
    test: int = Field(128, ge=1)
    paraphrases: int = Field(120, ge=4, description="Test captions without any keyword of the taxonomy.")
    seed: int = Field(11, description="Scenes and captions.")
    size: tuple[int, int] = Field((96, 96), description="Height, width.")
    frames: int = 17


class SamplingChoice(Settings):
    """How test videos are made; what is left out is the model's own."""

    steps: int | None = Field(None, ge=1)
    guidance: float | None = Field(None, ge=1)
    batch_size: int = Field(64, ge=1)
    seed: int = Field(5, description="Noise of validation and test videos, the same for every arm.")


class ComparisonSettings(Settings):
    """Arms over one merged stage 1: the same clips, order, noise, region loss, sampling, steps, sweep and seeds."""

    tasks: tuple[TaskName, ...] = Field(("t2v", "i2v"), min_length=1, description="Identity on t2v, tip on i2v.")
    clips: ClipCounts = ClipCounts()
    sampling: SamplingChoice = SamplingChoice()
    stage1: dict[str, Any] = Field(description="train-lora settings of stage 1.")
    train: dict[str, Any] = Field(description="Settings every arm of stage 2 shares.")
    plain: dict[str, Any] = Field(description="train-lora settings of the plain LoRA of the same size.")
    continued: dict[str, Any] = Field({}, description="train-lora settings of the plain LoRA continued from stage 1.")
    mixture: dict[str, Any] = Field(description="train-moe settings of the mixture.")
    router_lr: float = Field(gt=0, description="The same at every lr of the experts.")
    lrs: tuple[float, ...] = Field(min_length=1, description="The sweep, the same for every arm; chosen on validation.")
    seeds: tuple[int, ...] = Field(min_length=1, description="Training seeds; the sweep runs at the first.")
    alphas: tuple[float, ...] = Field((0.5, 1.25, 1.5), description="alpha_expert besides 0 and 1.")
    ablations: dict[str, dict[str, Any]] = Field(
        {}, description="Settings that differ, by name; of the mixture unless `arm` says another.")
    ablation_seeds: tuple[int, ...] = ()
    merged: dict[str, dict[str, tuple[str, ...]]] = Field(
        {}, description="Taxonomies of merged families for ablations: name, then family = [families of surgical4].")
    timing_steps: int = Field(60, ge=2, description="Steps of each noise expert, alone on the machine, for the time.")
    dtype: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _known(self) -> ComparisonSettings:
        if extra := set(self.ablation_seeds) - set(self.seeds):
            raise ValueError(f"ablation_seeds holds {sorted(extra)}, which are not in seeds: there is no mixture to "
                             "hold them against")
        for name, changes in self.ablations.items():
            if changes.get("arm", MIXTURE) not in (MIXTURE, SAME_SIZE):
                raise ValueError(f"ablations.\"{name}\".arm = {changes['arm']!r}: must be \"{MIXTURE}\" or "
                                 f"\"{SAME_SIZE}\"")
        return self
