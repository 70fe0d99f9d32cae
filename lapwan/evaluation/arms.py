"""The arms of a comparison, as in a clinical trial: adapters on a base, and how a mixture's experts are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lapwan import console
from lapwan.checkpoints.fingerprints import json_fingerprint
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.clips import EvaluationClip
from lapwan.models.base import Base
from lapwan.models.fingerprints import text_encoder_fingerprint, vae_fingerprint
from lapwan.moe.mixture_file import read_mixture
from lapwan.sampling.adapters import AdapterSet, read_adapters
from lapwan.sampling.facts import lora_facts
from lapwan.settings.lora_argument import KeyRule, LoraArgument

TRUTH, WRONG = "truth", "wrong"


@dataclass(frozen=True, eq=False)
class Arm:
    """One adapter (or none) under comparison; every arm is evaluated on the same clips, noise and seeds.

    `hint`: None leaves the choice to the mixture's router; "truth" gives each clip's own label, "wrong" another
    family, anything else is a hint as for `generate`.
    """

    name: str
    base: Base
    adapters: AdapterSet = field(default_factory=AdapterSet)
    hint: str | None = None
    alpha_base: float | None = None
    alpha_expert: Any = None

    @property
    def routed(self) -> bool:
        """Whether a mixture's router chooses the experts."""
        return self.adapters.mixture is not None and self.hint is None

    def hint_for(self, clip: EvaluationClip) -> str | None:
        """The hint for a clip's video; None without a mixture, and if its router chooses."""
        mixture = self.adapters.mixture
        if mixture is None or self.hint not in (TRUTH, WRONG):
            return self.hint
        taxonomy = Taxonomy.from_dict(mixture.taxonomy)
        return clip.hint(taxonomy) if self.hint == TRUTH else clip.wrong_hint(taxonomy)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of everything that its videos depend on, apart from clips and sampling."""
        spec = self.base.spec
        inputs = {
            "base": {e.value: self.base.fingerprint(e) for e in spec.noise_experts}, "task": spec.task,
            "boundary": spec.boundary, "vae": vae_fingerprint(spec), "text": text_encoder_fingerprint(spec),
            "loras": [{k: v for k, v in fact.items() if k != "file"} for fact in lora_facts(self.adapters)],
            "mixture": self.adapters.mixture_fingerprint(), "hint": self.hint, "alpha_base": self.alpha_base,
            "alpha_expert": self.alpha_expert,
        }
        return json_fingerprint(inputs)


def make_arm(
    name: str, base: Base, loras: Sequence[LoraArgument] = (), moe: Path | None = None, any_base: bool = False,
    fold: bool = False, rule: KeyRule = "default", **choice: Any,
) -> Arm:
    """An arm from files, checked against the model's headers.

    Args:
        any_base: accept a mixture that was trained on another base, with a warning.
        fold: merge the LoRAs into the weights, as in `read_adapters`.
        rule: what of a LoRA's file may be dropped.
        choice: `hint`, `alpha_base`, `alpha_expert`.

    Raises:
        UserError: files that `read_adapters` rejects, or a hint without a mixture.
    """
    given = [key for key, value in choice.items() if value is not None]
    if given and moe is None:
        raise UserError(f"adapter '{name}': {given[0]} acts on a mixture; give it one with moe = FILE")
    try:
        if moe is not None and any_base and not fold:  # with fold: refused below
            base, adapters = _on_another_base(name, base, loras, moe, rule)
        else:
            base, adapters = read_adapters(base, loras, moe, fold, rule)
    except UserError as error:
        raise error.within(f"adapter '{name}'") from None
    return Arm(name, base, adapters, **choice)


def _on_another_base(
    name: str, base: Base, loras: Sequence[LoraArgument], moe: Path, rule: KeyRule
) -> tuple[Base, AdapterSet]:
    mixture = read_mixture(moe)
    if mixture.base_lora:
        raise UserError(f"{moe} needs the base LoRA that it was trained with, which any_base does not load; leave "
                        "any_base out")
    base, adapters = read_adapters(base, loras, None, rule=rule)
    spec = mixture.spec
    other = [e.value for e in base.spec.noise_experts if spec.base.get(e) not in (None, base.fingerprint(e))]
    if spec.task != base.task:
        console.warn(f"adapter '{name}': {moe} was trained for {spec.task}; this model is {base.task}")
    elif other:
        console.warn(f"adapter '{name}': {moe} was trained on another base ({', '.join(other)} noise differs)")
    return base, AdapterSet(adapters.loras, mixture, moe)
