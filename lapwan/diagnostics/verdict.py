"""Judge a LoRA's or mixture's figures for a purpose: rules with value, threshold, source and advice.

For `motion` the high noise expert should dominate, for `character` (and style) the low one. The thresholds come from
one run's experience, and the report names them so. Some were stated for the legacy magnitude, which contains the floor
that A starts with; the rule on mean|B| uses the same threshold net of the floor.

How to add a rule: a function `(Evidence) -> Rule | None` in `_RULES`; it returns None if its figures are absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lapwan.diagnostics.lora_figures import Figures
from lapwan.diagnostics.mixture import MIN_WINDOW_LINES
from lapwan.diagnostics.router_health import RoutingThresholds

Status = Literal["good", "warn", "stop"]
PresetName = Literal["motion", "character"]
_ORDER: tuple[Status, ...] = ("good", "warn", "stop")
_EXPERIENCE = "one run's experience"
# The floor of rank-any LoRA on all Linears of Wan-14B: thresholds on the magnitude itself hold for its shapes only.
_WAN_14B_FLOOR = 0.00318


@dataclass(frozen=True)
class Preset:
    """Which noise expert must lead, and the ranges that worked in practice."""

    name: PresetName
    leader: str
    follower: str
    magnitude: tuple[float, float] | None  # range of the leader's legacy magnitude
    steps: tuple[int, int]


PRESETS: dict[PresetName, Preset] = {
    "motion": Preset("motion", "high", "low", (0.008, 0.010), (1800, 2200)),
    "character": Preset("character", "low", "high", None, (500, 800)),
}


@dataclass(frozen=True)
class Rule:
    """A judged rule. `value` is None if it is not a finite number."""

    rule: str
    value: float | None
    threshold: str
    status: Status
    source: str
    action: str


@dataclass(frozen=True)
class Evidence:
    """The input of every rule; `rates` is the lr by label, `growth` the list of the JSON."""

    preset: Preset
    figures: Mapping[str, Figures]
    rates: Mapping[str, float]
    growth: Sequence[Mapping[str, Any]]
    step: int | None
    overlaps: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None  # of a mixture, by label
    routing: Mapping[str, Any] | None = None  # of a mixture: `router`, and `windows` of its run, the last one judged
    one_transformer: bool = False  # for all noise: there is no other noise expert to compare with

    def lead(self, name: str) -> float | None:
        """The figure `name` of the leader over that of the follower."""
        both = [self.figures.get(label) for label in (self.preset.leader, self.preset.follower)]
        values = [getattr(f, name) if f is not None else None for f in both]
        return quotient(*values)


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """numerator / denominator; None if either is absent or the result is not finite."""
    if numerator is None or denominator is None or denominator == 0:
        return None
    value = numerator / denominator
    return value if math.isfinite(value) else None


def _grade(value: float, warn_below: float, stop_below: float = -math.inf) -> Status:
    return "stop" if value < stop_below else "warn" if value < warn_below else "good"


def _strengthen_leader(preset: Preset) -> str:
    return (f"raise the {preset.leader} noise expert's LR floor and ceiling or cap the {preset.follower} one's; "
            "meanwhile use an earlier checkpoint")


def _legacy_ratio(evidence: Evidence) -> Rule | None:
    value, preset = evidence.lead("legacy_mean_abs"), evidence.preset
    if value is None or not comparable(evidence.figures[preset.leader]):
        return None
    return Rule(f"legacy magnitude, {preset.leader} / {preset.follower}", value, ">= 1.5", _grade(value, 1.5),
                f"{_EXPERIENCE}; the figure contains the floor A starts with", _strengthen_leader(preset))


def _b_ratio(evidence: Evidence) -> Rule | None:
    value, preset = evidence.lead("mean_abs_B"), evidence.preset
    if value is None:
        return None
    source = f"{_EXPERIENCE}, net of the floor: 1.5 on the legacy figure at 0.008-0.010 is 1.95-2.24 here"
    return Rule(f"mean|B|, {preset.leader} / {preset.follower}", value, ">= 2.0, stop < 1.0",
                _grade(value, 2.0, 1.0), source, _strengthen_leader(preset))


def _delta_ratio(evidence: Evidence) -> Rule | None:
    value, preset = evidence.lead("delta_norm"), evidence.preset
    if value is None:
        return None
    return Rule(f"norm of the update, {preset.leader} / {preset.follower}", value, ">= 1.5, stop < 1.0",
                _grade(value, 1.5, 1.0), "what acts on the model: alpha and A included", _strengthen_leader(preset))


def _magnitude(evidence: Evidence) -> Rule | None:
    figures, wanted = evidence.figures.get(evidence.preset.leader), evidence.preset.magnitude
    if figures is None or wanted is None or figures.legacy_mean_abs is None or not comparable(figures):
        return None
    value, (low, high) = figures.legacy_mean_abs, wanted
    action = ("train on, or raise this noise expert's LR" if value < low else
              "beyond what was tried: compare with an earlier checkpoint" if value > high else "none")
    return Rule(f"legacy magnitude of {evidence.preset.leader}", value, f"{low:g} to {high:g}",
                "good" if low <= value <= high else "warn", f"{_EXPERIENCE} on Wan-14B", action)


def comparable(figures: Figures) -> bool:
    """True if the floor is Wan-14B's within 15 % (LoRAs on attention only are within), so that magnitudes compare."""
    return figures.init_floor is not None and abs(figures.init_floor / _WAN_14B_FLOOR - 1) < 0.15


def _lr_ratio(evidence: Evidence) -> Rule | None:
    preset = evidence.preset
    value = quotient(evidence.rates.get(preset.leader), evidence.rates.get(preset.follower))
    if value is None:
        return None
    return Rule(f"LR, {preset.leader} / {preset.follower}", value, "3 to 5 (4 advised), 6 at most",
                "good" if 3 <= round(value, 6) <= 6 else "warn", _EXPERIENCE,  # 3e-4 / 1e-4 is 2.9999999999999996
                "set both LR bounds so that their midpoints have this ratio; the bumps do not decide it")


def _follower_grows_faster(evidence: Evidence) -> Rule | None:
    """Growth of mean|B| since the last checkpoint, each noise expert's relative to √step of its own steps."""
    last = evidence.growth[-1] if evidence.growth else {}
    preset = evidence.preset
    leader, follower = (_relative_growth(last.get(label, {})) for label in (preset.leader, preset.follower))
    if leader is None or follower is None or follower <= 0:
        return None
    value = follower / leader if leader > 0 else None
    status: Status = "stop" if value is None else _ORDER[(value > 1.1) + (value >= 1.3)]
    action = "none" if status == "good" else (
        f"stop and use a checkpoint of step {last.get('from_step')} or before; {_strengthen_leader(preset)}")
    return Rule(f"{preset.follower} grows faster than {preset.leader} (mean|B|, at each one's own steps)", value,
                "<= 1.1, stop >= 1.3", status, f"{_EXPERIENCE}: at 1.3 motion was damped", action)


def _relative_growth(growth: Mapping[str, Any]) -> float | None:
    """Growth of mean|B| over the growth of √step; None if the noise expert took no step."""
    grown, expected = growth.get("mean_abs_B"), growth.get("sqrt_step")
    return None if grown is None or not expected else float(grown) / float(expected)


def _steps(evidence: Evidence) -> Rule | None:
    if evidence.step is None:
        return None
    step, (low, high) = evidence.step, evidence.preset.steps
    action = "train on" if step < low else "compare with an earlier checkpoint" if step > high else "none"
    status: Status = "warn" if step > high else "good"
    return Rule("steps, both noise experts together", float(step), f"{low} to {high}", status, _EXPERIENCE, action)


def _broken(evidence: Evidence) -> Rule | None:
    count = sum(f.nonfinite_modules for f in evidence.figures.values())
    source = "NaN or inf in A, B or alpha" + (", or values whose squares overflow in fp32" if count else "")
    return Rule("non-finite modules", float(count), "0", "stop" if count else "good", source,
                "do not use this file; lower the LR and continue from an earlier checkpoint" if count else "none")


def _dead(evidence: Evidence) -> Rule | None:
    figures = evidence.figures.values()
    count, modules = sum(f.dead_modules for f in figures), sum(f.modules for f in figures)
    status: Status = "good" if count == 0 else "stop" if count == modules else "warn"
    return Rule("dead modules", float(count), "0", status, "B = 0: the module changes nothing",
                "check that these modules were trained and that gradients reach them" if count else "none")


def _overlap(evidence: Evidence) -> Rule | None:
    pairs = [(value, a, b) for matrix in (evidence.overlaps or {}).values() for a, row in matrix.items()
             for b, value in row.items() if a < b and value is not None]
    if not pairs:
        return None
    value, a, b = max(pairs)
    return Rule(f"largest overlap of two experts ({a}, {b})", value, "< 0.9", "good" if value < 0.9 else "warn",
                "cosine of their updates; at 1 they are one expert",
                "look at the labels of their clips, lower the balance weight, or merge the two families")


def _last_window(evidence: Evidence) -> Mapping[str, Any] | None:
    """The last window of a mixture's run, if it has enough lines to be judged."""
    windows = (evidence.routing or {}).get("windows") or []
    judged = bool(windows) and len(windows[-1]["usage"]) > 1 and windows[-1]["lines"] >= MIN_WINDOW_LINES
    return windows[-1] if judged else None


def _entropy(evidence: Evidence) -> Rule | None:
    window = _last_window(evidence)
    if window is None or window["entropy"] is None or not (evidence.routing or {})["router"]["parameters"]:
        return None  # gates without parameters are the labels themselves
    low = RoutingThresholds().scaled(len(window["usage"]))[0]
    return Rule("routing entropy, nats, over the last steps", window["entropy"], f">= {low:.2g}",
                _grade(window["entropy"], low), "rule of thumb: below it the router has collapsed",
                "raise routing_loss.entropy and routing_loss.balance, and check the label file")


def _usage(evidence: Evidence) -> Rule | None:
    """Judge the most used expert if its usage is too high, else the least used one."""
    window = _last_window(evidence)
    if window is None:
        return None
    shares = {family: share for family, share in window["usage"].items() if share is not None}
    _, least, most = RoutingThresholds().scaled(len(shares))
    family = max(shares, key=shares.__getitem__)
    if shares[family] <= most:
        family = min(shares, key=shares.__getitem__)
    value = shares[family]
    return Rule(f"usage of '{family}' over the last steps", value, f"{least:.2g} to {most:.2g}",
                "good" if least <= value <= most else "warn", "rule of thumb, scaled to the number of experts",
                "raise routing_loss.balance or data.balance, and check the label file")


# The thresholds for plain LoRAs do not apply to a mixture, whose experts act through gates.
_MIXTURE_RULES = (_broken, _dead, _overlap, _entropy, _usage)
_ONE_TRANSFORMER_RULES = (_broken, _dead)
_RULES = (_broken, _dead, _b_ratio, _delta_ratio, _legacy_ratio, _magnitude, _lr_ratio, _follower_grows_faster, _steps)


def judge(evidence: Evidence) -> dict[str, Any]:
    """The `verdict` of the JSON: preset, worst status, every rule that could be judged, and notes."""
    mixture = evidence.overlaps is not None
    applied = _MIXTURE_RULES if mixture else _ONE_TRANSFORMER_RULES if evidence.one_transformer else _RULES
    judged = [rule(evidence) for rule in applied]
    rules = [rule for rule in judged if rule is not None]
    status = max((rule.status for rule in rules), key=_ORDER.index, default="good")
    notes = ["a mixture: the rules for plain LoRAs are not applied"] if mixture else _notes(evidence)
    return {"preset": evidence.preset.name, "status": status, "rules": [asdict(rule) for rule in rules], "notes": notes}


def _notes(evidence: Evidence) -> list[str]:
    """Rules that could not be judged, and why."""
    if evidence.one_transformer:
        return ["one transformer for all noise: ratios of high and low, magnitude, learning rates and number of steps "
                "are not judged, whose thresholds are from models of two noise experts"]
    notes = []
    leader_name = evidence.preset.leader
    leader = evidence.figures.get(leader_name)
    if leader is not None and leader.init_floor is not None and not comparable(leader):
        notes.append(f"the legacy magnitude is not judged: {leader_name}'s floor {leader.init_floor:.3g} is not that "
                     f"of Wan-14B's Linears ({_WAN_14B_FLOOR:g}), for which the thresholds were found")
    if len(evidence.figures) < 2:
        notes.append("one noise expert only: no ratios")
    return notes
