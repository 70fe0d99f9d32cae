"""From figures to what `inspect-weights` prints and writes: the JSON that scripts rely on, and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.table import Table

from lapwan.diagnostics.lora_figures import Figures, ModuleFigures, group_by, summarise
from lapwan.diagnostics.verdict import quotient

FORMAT = 1
RATIOS = ("legacy_mean_abs", "mean_abs_B", "delta_norm")
_MORE_RATIOS = ("mean_abs_A", "spectral_norm_max", "stable_rank_mean", "effective_rank_mean")
By = Literal["expert", "block", "projection"]
_SIZES = {
    "modules": "modules", "parameters": "parameters", "rank": "rank (most frequent)",
    "dead_modules": "dead modules (B = 0)", "nonfinite_modules": "non-finite modules",
}
_ROWS = {
    **_SIZES,
    "legacy_mean_abs": "mean|w|, A and B (legacy magnitude)", "init_floor": "  of which the floor A starts with",
    "mean_abs_A": "mean|A|", "mean_abs_B": "mean|B|", "delta_norm": "norm of the update (alpha/r BA)",
    "spectral_norm_max": "largest singular value", "stable_rank_mean": "stable rank, mean",
    "effective_rank_mean": "effective rank, mean",
}
# Of a table with many rows.
_SHORT = {
    "legacy_mean_abs": "mean|w|", "init_floor": "floor", "mean_abs_B": "mean|B|", "delta_norm": "update",
    "spectral_norm_max": "largest", "stable_rank_mean": "stable", "effective_rank_mean": "effect.",
}


def ratios(figures: Mapping[str, Figures], rates: Mapping[str, float]) -> dict[str, float | None]:
    """high / low of each figure and of lr; None where one is absent."""
    found: dict[str, float | None] = {}
    for name in (*RATIOS, *_MORE_RATIOS):
        values = [getattr(figures[label], name) if label in figures else None for label in ("high", "low")]
        found[name] = quotient(*values)
    found["lr"] = quotient(rates.get("high"), rates.get("low"))
    return found


def grouped(modules: Mapping[str, Sequence[ModuleFigures]], by: By) -> dict[str, dict[str, Figures]]:
    """Figures by group, then by label; blocks in the order of their numbers."""
    found: dict[str, dict[str, Figures]] = {}
    for label, own in modules.items():
        for name, members in group_by(own, lambda m: m.block if by == "block" else m.projection).items():
            found.setdefault(name, {})[label] = summarise(members)
    return {name: found[name] for name in sorted(found, key=lambda n: (0, int(n), n) if n.isdigit() else (1, 0, n))}


def document(
    figures: Mapping[str, Figures], modules: Mapping[str, Sequence[ModuleFigures]], rates: Mapping[str, float],
    growth: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any], by: By,
    mixture: Mapping[str, Any] | None = None, routing: Mapping[str, Any] | None = None,
    base_norms: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The JSON of `inspect-weights`, format 1; an absent figure is null.

    Args:
        mixture: what `diagnostics.mixture.describe` says, by label; `routing`: its router, and windows of the run.
        base_norms: the base's weight norms by label and module; adds `relative_delta`, the update's norm over them.
    """
    result: dict[str, Any] = {
        "format": FORMAT,
        "experts": {label: asdict(one) for label, one in figures.items()},
        "ratios": ratios(figures, rates),
        "lr": dict(rates),
        "growth": list(growth),
        "verdict": dict(verdict),
        "nonfinite": {label: [m.path for m in own if not m.finite] for label, own in modules.items()},
        "dead": {label: [m.path for m in own if m.dead] for label, own in modules.items()},
    }
    if by != "expert":
        result["by"] = {
            "key": by,
            "groups": {name: {"experts": {label: asdict(one) for label, one in own.items()}, "ratios": ratios(own, {})}
                       for name, own in grouped(modules, by).items()},
        }
    for label, norms in (base_norms or {}).items():
        base = math.hypot(*norms.values())
        result["experts"][label]["relative_delta"] = quotient(figures[label].delta_norm, base)
    if mixture is not None:
        result["mixture"] = dict(mixture)
    if routing is not None:
        result["routing"] = dict(routing)
    return result


def figure_table(title: str, figures: Mapping[str, Figures]) -> Table:
    """A row for each figure, a column for each noise expert, and high / low."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for label in figures:
        table.add_column(label, justify="right")
    two = {"high", "low"} <= set(figures)
    if two:
        table.add_column("high / low", justify="right")
    for key, name in _ROWS.items():
        values = [getattr(one, key) for one in figures.values()]
        cells = [str(value) if isinstance(value, int) else shown(value) for value in values]
        compared = two and key not in _SIZES and key != "init_floor"
        ratio = quotient(getattr(figures["high"], key), getattr(figures["low"], key)) if compared else None
        table.add_row(name, *cells, *([shown(ratio) if compared else ""] if two else []))
    return table


def group_tables(groups: Mapping[str, Mapping[str, Figures]], by: By) -> list[Table]:
    """By block or projection: a table of all figures for each noise expert, and one of high / low."""
    labels = list(dict.fromkeys(label for own in groups.values() for label in own))
    tables = []
    for label in labels:
        table = _narrow(label, by, groups, [*_SHORT.values(), "dead", "bad"])
        for group, own in groups.items():
            if (one := own.get(label)) is not None:
                cells = (brief(getattr(one, key)) for key in _SHORT)
                table.add_row(group, *cells, str(one.dead_modules), str(one.nonfinite_modules))
        tables.append(table)
    if {"high", "low"} <= set(labels):
        compared = [key for key in _SHORT if key != "init_floor"]
        table = _narrow("high / low", by, groups, [_SHORT[key] for key in compared])
        for group, own in groups.items():
            quotients = ratios(own, {})
            table.add_row(group, *(brief(quotients[key]) for key in compared))
        tables.append(table)
    return tables


def _narrow(title: str, by: By, groups: Iterable[str], columns: Sequence[str]) -> Table:
    """Fits 80 columns with nine figures."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(by, min_width=max((len(group) for group in groups), default=0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def overlap_table(label: str, described: Mapping[str, Any]) -> Table:
    """A mixture's experts: their norm and how they overlap."""
    families = described["families"]
    table = Table(title=f"{label}: experts", title_justify="left", box=None, pad_edge=False)
    for name in ("expert", "mean|B|", "update", "alpha / rank", "gated", *(f"overlap {family}" for family in families)):
        table.add_column(name, justify="left" if name == "expert" else "right", min_width=9)
    for family, one in families.items():
        row = described["overlap"][family]
        cells = (shown(one[key]) for key in ("mean_abs_B", "delta_norm", "alpha_over_rank", "gated_norm"))
        table.add_row(family, *cells, *(f"{row[other]:+.2f}" if row[other] is not None else "-" for other in families))
    return table


def gate_lines(mixture: Mapping[str, Any]) -> list[str]:
    """w(σ) of each noise expert at its knots, and over the sampling steps."""
    lines = []
    for label, described in mixture.items():
        gate = described["timestep_gate"]
        knots = ", ".join(f"{w:.3g} at {sigma:.3g}" for sigma, w in zip(gate["sigma"], gate["strength"], strict=True))
        lines.append(f"timestep gate of {label}, w(sigma): {knots}")
        if (used := gate["sampling"]) is not None:
            lines.append(f"  over its {used['steps']} sampling steps: mean {used['mean']:.3g}, {used['min']:.3g} to "
                         f"{used['max']:.3g} (gated = mean x update)")
    return lines


def router_line(router: Mapping[str, Any]) -> str:
    """The router in a line."""
    learned = f", {router['parameters']} numbers, temperature {router['temperature']:g}" if router["parameters"] else ""
    acts = "the labels themselves act" if router["kind"] == "rule" else f"the {router['top_k']} likeliest experts act"
    return f"router: {router['kind']}{learned}; {acts}; largest entropy {router['largest_entropy']:.3f} nats"


def routing_table(routing: Mapping[str, Any]) -> Table | None:
    """Usage and entropy over the run, or a label router's answers; None where neither is known."""
    router, windows = routing["router"], routing["windows"]
    if not windows and not router["by_label"]:
        return None
    title = "routing over the run (usage after top-k)" if windows else "the router's answer to each label"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("steps" if windows else "label")
    for name in (*router["families"], "entropy", *(("accuracy", "KL to teacher") if windows else ())):
        table.add_column(name, justify="right")
    for one in windows:
        shares = (percent_of(one["usage"][family]) for family in router["families"])
        table.add_row(f"{one['from_step']} - {one['to_step']}", *shares, shown(one["entropy"]),
                      percent_of(one["accuracy"]), shown(one["teacher_kl"]))
    for label, answer in {} if windows else router["by_label"].items():
        table.add_row(label, *(percent_of(answer["mix"][f]) for f in router["families"]), shown(answer["entropy"]))
    return table


def growth_table(growth: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each pair of checkpoints and noise expert."""
    title = "growth between checkpoints (net: less the floor; √steps: what noise alone gives)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("steps", "", "mean|w|", "net", "mean|B|", "update", "√steps", "cosine of updates"):
        table.add_column(name, justify="left" if name in ("steps", "") else "right")
    for entry in growth:
        for label, one in entry.items():
            if isinstance(one, Mapping):
                cells = (percent(one[key]) for key in ("legacy", "net", "mean_abs_B", "delta_norm", "sqrt_step"))
                table.add_row(f"{entry['from_step']} - {entry['to_step']}", label, *cells, shown(one["update_cosine"]))
    return table


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """A line for each rule, and below one that is not good its source and what to do."""
    lines = [f"verdict for {verdict['preset']}: {verdict['status']}"]
    for rule in verdict["rules"]:
        lines.append(f"  {rule['status']}  {rule['rule']}: {shown(rule['value'])} (wanted {rule['threshold']})")
        if rule["status"] != "good":
            lines += [f"        from: {rule['source']}", f"        to do: {rule['action']}"]
    return lines + [f"  note  {note}" for note in verdict["notes"]]


def shown(value: float | None) -> str:
    """Four digits; `-` for what is absent."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def brief(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def percent_of(share: float | None) -> str:
    """`25.0 %`."""
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def percent(value: float | None) -> str:
    """`+11.8 %`."""
    return "-" if value is None else f"{value:+.1%}".replace("%", " %")
