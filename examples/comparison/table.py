"""`result.md`: the comparison as tables that go into a README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TITLES = {"t2v": "Text to video: the named instrument is seen",
           "i2v": "Image to video: the tip within 5 % of the diagonal"}


def markdown(summary: Mapping[str, Any], command: str) -> str:
    """Every table, then command and machine."""
    parts = [_arms(task, entry) for task, entry in summary["tasks"].items()]
    parts += [_goals(summary), _routing(summary), _ablations(summary)]
    if (times := summary.get("seconds_per_step")) is not None:
        names = [name for name in times if name != "ratio"]
        shown = ", ".join(f"{name} {1000 * times[name]:.1f} ms" for name in names)
        parts.append(f"An optimizer step of one noise expert, alone on the machine: {shown}; ratio "
                     f"{times['ratio']:.2f}.")
    where = ""
    if machine := summary["machine"]:
        where = f", on {machine['gpu'] or 'a CPU'} with {machine['cpus']} CPU cores, torch {machine['torch']}"
    parts.append(f"`{command}`{where}. Intervals are 95 % bootstrap intervals over prompts and training seeds.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _percent(estimate: Mapping[str, Any] | None, sign: bool = False) -> str:
    if estimate is None or estimate["mean"] is None:
        return ""
    mark = "+" if sign else ""
    text = f"{100 * estimate['mean']:{mark}.1f} %"
    if estimate["ci95"] is None:
        return text
    low, high = estimate["ci95"]
    return f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _arms(task: str, summary: Mapping[str, Any]) -> str:
    metric, columns = summary["metric"], ["identity"] if summary["metric"] != "identity" else []
    chosen = {arm: f"{entry['chosen']:g}" for arm, entry in summary["sweep"].items()}
    against = {(d["a"], d["b"]): d for d in summary["differences"]}
    rows = []
    for arm, scores in summary["arms"].items():
        lr = chosen.get(arm.partition(", ")[0] if arm.startswith("mixture") else arm, "")
        same = against.get((arm, "plain, same size"))
        rows.append([arm, lr, _percent(scores.get(metric)), _percent(same, sign=True),
                     _percent(same["relative_error_reduction"]) if same else "",
                     *(_percent(scores.get(other)) for other in columns)])
    header = ["arm", "lr", metric, "against plain, same size", "fewer errors", *columns]
    text = f"**{_TITLES[task]}** ({summary['prompts']} prompts, training seeds {summary['training_seeds']})\n\n"
    text += _table(header, rows)
    if (wrong := summary.get("wrong_hint")) is not None:
        text += (f"\n\nThe instrument that a wrong hint names is seen in {_percent(wrong['seen_with_it'])} of the "
                 f"videos with it, in {_percent(wrong['seen_with_the_router'])} without.")
    sizes = ", ".join(f"{arm} {entry['parameters']:,}" for arm, entry in summary["sweep"].items())
    return text + (f"\n\nTrained numbers: {sizes}." if sizes else "")


def _goals(summary: Mapping[str, Any]) -> str:
    rows = [[goal["goal"], f"{100 * goal['value']:.1f} %", f"above {100 * goal['wanted']:g} %",
             "met" if goal["met"] else "missed"] for goal in summary["goals"]]
    return _table(["goal", "measured", "wanted", ""], rows) if rows else ""


def _routing(summary: Mapping[str, Any]) -> str:
    parts = []
    for kind, entry in summary["routing"].items():
        families = entry["families"]
        parts.append(f"Routing accuracy, {kind}: {_percent(entry['accuracy'])}; a linear probe "
                     f"{_percent(entry['probe'])}; entropy {entry['entropy']:.2f} nats.")
        rows = [[f"**{family}**", *map(str, row)] for family, row in zip(families, entry["confusion"], strict=True)]
        parts.append(_table(["label \\ router", *families], rows))
    return "\n\n".join(parts)


def _ablations(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in summary["ablations"].items():
        metric = next(key for key in entry if key in ("identity", "tip_accuracy"))
        accuracy = entry["routing_accuracy"]
        rows.append([name, _percent(entry[metric]), _percent(entry["minus_the_mixture"], sign=True),
                     "" if accuracy is None else f"{100 * accuracy:.1f} %", "; ".join(entry["routing_faults"])])
    header = ["ablation", "identity", "against the mixture", "routing accuracy", "warned of"]
    return _table(header, rows) if rows else ""
