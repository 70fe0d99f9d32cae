"""Settings of `lapwan evaluate`.

How to add a metric: its name in `METRICS` and `Metric`, and the steps listed in `lapwan.evaluation.metrics`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Flag, Settings, height_width
from lapwan.settings.generate import ModelSettings, number_or_named
from lapwan.settings.lora_argument import LoraArgument
from lapwan.settings.model import ModelChoice
from lapwan.settings.rewards import REWARD_METAVAR, Rewards

METRICS = ("identity", "tip", "reference", "temporal", "reward")
Metric = Literal["identity", "tip", "reference", "temporal", "reward"]


class AdapterSettings(Settings):
    """One entry of the comparison: LoRAs, or a mixture and how its experts are chosen; a name alone is the base."""

    name: str = Field(pattern=r"^[^/\\\n]+$", description="Name in tables, JSON and folders.")
    model: ModelChoice | None = Field(None, description="Another base than the evaluation's.")
    lora: tuple[LoraArgument, ...] = Field((), description="FILE[:STRENGTH], high=FILE, low=FILE, both=FILE.")
    moe: Path | None = Field(None, description="A mixture of LoRA experts.")
    hint: str | None = Field(
        None, description="Absent: the router chooses; truth: each clip's label; wrong: another family; or a hint as "
        "for generate.")
    alpha_base: float | None = None
    alpha_expert: float | dict[str, float] | None = None
    any_base: bool = Field(False, description="Accept a mixture trained on another base or task, with a warning.")

    @field_validator("alpha_expert", mode="before")
    @classmethod
    def _alpha_expert(cls, value: Any) -> Any:
        return number_or_named(value, "hook=1.2,other=0.8")

    @model_validator(mode="after")
    def _of_a_mixture(self) -> AdapterSettings:
        for name in ("hint", "alpha_base", "alpha_expert"):
            if self.moe is None and getattr(self, name) is not None:
                raise ValueError(f"adapter '{self.name}': {name} acts on a mixture; give it one with moe = FILE")
        if self.any_base and self.moe is None:
            raise ValueError(f"adapter '{self.name}': any_base is for a mixture; leave it out")
        return self


class LossSettings(Settings):
    """Flow losses on cached clips."""

    cache: Annotated[Path | None, Flag("--cache", metavar="DIR")] = Field(
        None, description="Cache with held-out clips, for flow losses; absent: none are measured.")
    labels: Path | None = Field(None, description="labels.jsonl for caches that carry no labels.")
    count: int | None = Field(
        None, ge=1, description="Largest number of clips, evenly spaced over the split; absent: all.")
    bins: int = Field(4, ge=1, description="Equal bins of sigma in each noise expert's band.")
    draws: int = Field(1, ge=1, description="Draws of sigma and noise per bin and clip.")
    batch_size: int = Field(4, ge=1, description="Clips at a time.")


class EvaluationVideoSettings(Settings):
    """Videos generated for held-out clips; absent values are the model's defaults."""

    clips: Annotated[Path | None, Flag("--clips", metavar="FILE")] = Field(
        None, description="Held-out clips to generate for (clips.jsonl or labels.jsonl); absent: no videos.")
    count: Annotated[int | None, Flag("--count", metavar="N")] = Field(
        None, ge=1, description="Generate for at most N clips, evenly spaced over the split; absent: all.")
    seeds: Annotated[int, Flag("--seeds", metavar="N")] = Field(
        1, ge=1, description="Videos per clip and adapter, each from its own seed.")
    batch_size: Annotated[int, Flag("--batch-size", metavar="N")] = Field(8, ge=1, description="Videos at a time.")
    metrics: tuple[Metric, ...] | None = Field(
        None, description=f"Some of {', '.join(METRICS)}; absent: all that the clips allow.")
    rewards: Annotated[Rewards | None, Flag("--reward", metavar=REWARD_METAVAR)] = Field(
        None, description="Also score frames against prompts: clip=FOLDER, hps=FILE, pickscore=FOLDER.")
    num_frames: int | None = Field(None, ge=1, description="4N+1.")
    size: tuple[int, int] | None = Field(None, description="(height, width) in pixels, or HEIGHTxWIDTH.")
    last_image: Annotated[bool, Flag("--last-image")] = Field(
        False, description="Image-to-video: give each video its clip's last frame, too, as generate --last-image does.")
    steps: Annotated[int | None, Flag("--steps", metavar="N")] = Field(
        None, ge=1, le=10_000, description="Sampling steps; absent: the model's default.")
    guidance: float | dict[NoiseExpert, float] | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    negative_prompt: str | None = None
    flow_shift: float | None = Field(None, gt=0)
    sampler: Literal["unipc", "euler", "dpmpp"] = "unipc"
    ceiling: bool = Field(
        True, description="Also measure the VAE's reconstructions of the clips, an upper bound for every video.")
    sheet: int = Field(8, ge=0, description="Clips on the contact sheets; 0: no sheets.")

    _size = field_validator("size", mode="before")(height_width)

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance(cls, value: Any) -> Any:
        return number_or_named(value, "high=4,low=3")

    @model_validator(mode="after")
    def _needs(self) -> EvaluationVideoSettings:
        if self.metrics is not None and "reward" in self.metrics and self.rewards is None:
            raise ValueError("metrics holds 'reward', but no rewards are given; set rewards, such as clip=FOLDER")
        return self


class RoutingSettings(Settings):
    """The router of a mixture on captions it has not seen."""

    captions: Annotated[Path | None, Flag("--captions", metavar="FILE")] = Field(
        None, description="Labelled captions to test the router on; absent: those of the clips, else of the cache.")
    paraphrases: Annotated[Path | None, Flag("--paraphrases", metavar="FILE")] = Field(
        None, description="A second file of labelled captions, such as paraphrases without any keyword.")
    probe: bool = Field(
        True, description="Also a linear probe of the text features for comparison; embedded model only.")


class IntervalSettings(Settings):
    """Percentile intervals by bootstrap over clips."""

    samples: int = Field(10_000, ge=100, description="Resamples.")
    level: float = Field(0.95, gt=0, lt=1)


class EvaluateSettings(ModelSettings):
    """Adapters compared on held-out clips at equal noise."""

    adapters: tuple[AdapterSettings, ...] = Field(
        (), description="The adapters to compare; the first one is the reference. Absent: the base, and what --lora "
        "and --moe name.")
    task: Annotated[Literal["t2v", "i2v"] | None, Flag(metavar="t2v|i2v")] = Field(
        None, description="For tiny, which has both (absent: the task of the cache, else t2v), and TI2V-5B: i2v "
                          "evaluates from the clips' first frames.")
    output: Annotated[Path, Flag("-o", "--output", metavar="DIR")] = Field(
        Path("evaluation"), description="Folder for evaluation.json, report.html, plot, sheets and videos.")
    resume: Annotated[bool, Flag("--resume")] = Field(
        False, description="Continue in an existing folder; finished videos that still match the settings are kept.")
    split: Annotated[str, Flag("--split", metavar="NAME")] = Field(
        "test", description="Use the clips of this split; all: every clip. Files without splits are used whole.")
    taxonomy: str = Field("surgical4", description="surgical4, cholec6 or a TOML file; a mixture brings its own.")
    judge: Annotated[str | None, Flag("--judge", metavar="FILE")] = Field(
        None, description="What measures identity and tip: a file of train-judge; tiny: the embedded model's judge of "
        "its scenes; tiny-1: its first one, which cannot say none. Absent: tiny.")
    judge_ceiling: float = Field(
        0.9, ge=0, le=1, description="Share of its own VAE reconstructions, held out from its training, whose "
        "instruments a judge must name; one below is refused.")
    seed: Annotated[int, Flag("--seed", metavar="N")] = Field(0, ge=0, description="Seed of noise and intervals.")
    loss: LossSettings = Field(default_factory=LossSettings)
    videos: EvaluationVideoSettings = Field(default_factory=EvaluationVideoSettings)
    routing: RoutingSettings = Field(default_factory=RoutingSettings)
    interval: IntervalSettings = Field(default_factory=IntervalSettings)

    @model_validator(mode="after")
    def _compared(self) -> EvaluateSettings:
        if self.adapters and (self.lora or self.moe is not None):
            raise ValueError("lora and moe are given beside adapters; put them into an entry of adapters")
        names = [re.sub(r"[^\w.=-]+", "_", adapter.name) for adapter in self.adapters]  # the names of their folders
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two adapters are called '{twice}'; give each its own name")
        if not (self.loss.cache or self.videos.clips or self.routing.captions):
            raise ValueError("nothing to measure: give --clips FILE (videos), --cache DIR (losses), or --captions FILE "
                             "(routing)")
        return self

    def compared(self) -> tuple[AdapterSettings, ...]:
        """`adapters` if given. Else the base and what `lora` and `moe` name; a mixture three times: by its router, with
        the right hint, and with a wrong one."""
        if self.adapters:
            return self.adapters
        compared = [AdapterSettings(name="base")]
        if self.lora:
            compared.append(AdapterSettings(name="lora", lora=self.lora))
        if self.moe is not None:
            compared += [AdapterSettings(name=name, lora=self.lora, moe=self.moe, hint=hint)
                         for name, hint in (("router", None), ("hint", "truth"), ("wrong hint", "wrong"))]
        return tuple(compared)
