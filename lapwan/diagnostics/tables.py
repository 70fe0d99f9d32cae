"""Output of `inspect-weights`: the JSON document, and tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.table import Table

from lapwan.diagnostics.lora_figures import Figures, ModuleFigures, group_by, summarise
from lapwan.diagnostics.verdict import quotient
from lapwan.lora.state import LowRank

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
    """high / low of each figure and of the lr; None if one of them is absent.

    Args:
        figures: by noise expert, `high` and `low`.
        rates: lr by noise expert.
    """
    result: dict[str, float | None] = {}
    for name in (*RATIOS, *_MORE_RATIOS):
        values = [getattr(figures[label], name) if label in figures else None for label in ("high", "low")]
        result[name] = quotient(*values)
    result["lr"] = quotient(rates.get("high"), rates.get("low"))
    return result


def grouped(modules: Mapping[str, Sequence[ModuleFigures]], by: By) -> dict[str, dict[str, Figures]]:
    """Figures by group, then by label; blocks in numerical order.

    Args:
        modules: figures of each module, by label.
        by: block or projection.
    """
    groups: dict[str, dict[str, Figures]] = {}
    for label, label_modules in modules.items():
        for name, members in group_by(label_modules, lambda m: m.block if by == "block" else m.projection).items():
            groups.setdefault(name, {})[label] = summarise(members)
    return {name: groups[name] for name in sorted(groups, key=lambda n: (0, int(n), n) if n.isdigit() else (1, 0, n))}


def document(
    figures: Mapping[str, Figures], modules: Mapping[str, Sequence[ModuleFigures]], rates: Mapping[str, float],
    growth: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any], by: By,
    mixture: Mapping[str, Any] | None = None, routing: Mapping[str, Any] | None = None,
    base_norms: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The JSON of `inspect-weights`, format 1; an absent figure is null.

    Args:
        figures: by label.
        modules: figures of each module, by label.
        rates: lr by label.
        growth: as `growth.growth` returns it.
        verdict: as `verdict.judge` returns it.
        by: block or projection, which adds figures by group; expert: none.
        mixture: the result of `diagnostics.mixture.mixture_json`, by label.
        routing: the mixture's router, and windows of its run.
        base_norms: the base's weight norms by label and module; adds `relative_delta`, the update's norm over theirs.
    """
    result: dict[str, Any] = {
        "format": FORMAT,
        "experts": {label: asdict(label_figures) for label, label_figures in figures.items()},
        "ratios": ratios(figures, rates),
        "lr": dict(rates),
        "growth": list(growth),
        "verdict": dict(verdict),
        "nonfinite": {label: [m.path for m in members if not m.finite] for label, members in modules.items()},
        "dead": {label: [m.path for m in members if m.dead] for label, members in modules.items()},
    }
    if by != "expert":
        result["by"] = {
            "key": by,
            "groups": {name: {"experts": {label: asdict(f) for label, f in group.items()}, "ratios": ratios(group, {})}
                       for name, group in grouped(modules, by).items()},
        }
    for label, norms in (base_norms or {}).items():
        base = math.hypot(*norms.values())
        result["experts"][label]["relative_delta"] = quotient(figures[label].delta_norm, base)
    if other := _other_kinds(modules):
        result["other_kinds"] = other
    if mixture is not None:
        result["mixture"] = dict(mixture)
    if routing is not None:
        result["routing"] = dict(routing)
    return result


def _other_kinds(modules: Mapping[str, Sequence[ModuleFigures]]) -> dict[str, dict[str, Any]]:
    """Modules that are not low-rank pairs of Linears, by label and kind: their count, norm, and the norm of each."""
    result: dict[str, dict[str, Any]] = {}
    for label, members in modules.items():
        for kind, group in group_by((m for m in members if m.kind != LowRank.KIND), lambda m: m.kind).items():
            result.setdefault(label, {})[kind] = {
                "modules": len(group), "parameters": sum(m.elements_other for m in group),
                "delta_norm": summarise(group).delta_norm,
                "delta_norm_of": {m.path: m.delta_norm if m.finite else None for m in group},
            }
    return result


def kinds_table(other: Mapping[str, Mapping[str, Any]]) -> Table:
    """The kinds of update other than LoRA: `other_kinds` of the document."""
    table = Table(title="updates that are not low-rank pairs", title_justify="left", box=None, pad_edge=False)
    for name in ("", "kind", "modules", "parameters", "update"):
        table.add_column(name, justify="left" if name in ("", "kind") else "right")
    for label, kinds in other.items():
        for kind, figures in kinds.items():
            norm = format_number(figures["delta_norm"])
            table.add_row(label, kind, str(figures["modules"]), str(figures["parameters"]), norm)
    return table


def figure_table(title: str, figures: Mapping[str, Figures]) -> Table:
    """A row for each figure, a column for each noise expert, and high / low.

    Args:
        title: of the table.
        figures: by noise expert.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for label in figures:
        table.add_column(label, justify="right")
    two = {"high", "low"} <= set(figures)
    if two:
        table.add_column("high / low", justify="right")
    for key, name in _ROWS.items():
        values = [getattr(label_figures, key) for label_figures in figures.values()]
        cells = [str(value) if isinstance(value, int) else format_number(value) for value in values]
        compared = two and key not in _SIZES and key != "init_floor"
        ratio = quotient(getattr(figures["high"], key), getattr(figures["low"], key)) if compared else None
        table.add_row(name, *cells, *([format_number(ratio) if compared else ""] if two else []))
    return table


def group_tables(groups: Mapping[str, Mapping[str, Figures]], by: By) -> list[Table]:
    """By block or projection: a table of all figures for each noise expert, and one of high / low.

    Args:
        groups: as `grouped` returns them.
        by: block or projection.
    """
    labels = list(dict.fromkeys(label for by_label in groups.values() for label in by_label))
    tables = []
    for label in labels:
        table = _narrow(label, by, groups, [*_SHORT.values(), "dead", "bad"])
        for group, by_label in groups.items():
            if (figures := by_label.get(label)) is not None:
                cells = (format_short(getattr(figures, key)) for key in _SHORT)
                table.add_row(group, *cells, str(figures.dead_modules), str(figures.nonfinite_modules))
        tables.append(table)
    if {"high", "low"} <= set(labels):
        compared = [key for key in _SHORT if key != "init_floor"]
        table = _narrow("high / low", by, groups, [_SHORT[key] for key in compared])
        for group, by_label in groups.items():
            quotients = ratios(by_label, {})
            table.add_row(group, *(format_short(quotients[key]) for key in compared))
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
    """A mixture's experts: their norms and overlaps.

    Args:
        label: of the noise expert.
        described: its entry of `mixture` in the JSON document.
    """
    families = described["families"]
    table = Table(title=f"{label}: experts", title_justify="left", box=None, pad_edge=False)
    for name in ("expert", "mean|B|", "update", "alpha / rank", "gated", *(f"overlap {family}" for family in families)):
        table.add_column(name, justify="left" if name == "expert" else "right", min_width=9)
    for family, figures in families.items():
        row = described["overlap"][family]
        cells = (format_number(figures[key]) for key in ("mean_abs_B", "delta_norm", "alpha_over_rank", "gated_norm"))
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
    """The router in one line."""
    learned = router["parameters"]
    size = f", {learned} parameters, temperature {router['temperature']:g}" if learned else ""
    gates = f"top-{router['top_k']} experts" if learned else "gates are the label weights"
    return f"router: {router['kind']}{size}; {gates}; largest entropy {router['largest_entropy']:.3f} nats"


def routing_table(routing: Mapping[str, Any]) -> Table | None:
    """Usage and entropy over the run, or a label router's gates; None if neither is known."""
    router, windows = routing["router"], routing["windows"]
    if not windows and not router["by_label"]:
        return None
    title = "routing over the run (usage after top-k)" if windows else "the router's gates for each label"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("steps" if windows else "label")
    for name in (*router["families"], "entropy", *(("accuracy", "KL to teacher") if windows else ())):
        table.add_column(name, justify="right")
    for window in windows:
        shares = (format_share(window["usage"][family]) for family in router["families"])
        table.add_row(f"{window['from_step']} - {window['to_step']}", *shares, format_number(window["entropy"]),
                      format_share(window["accuracy"]), format_number(window["teacher_kl"]))
    for label, gates in {} if windows else router["by_label"].items():
        shares = (format_share(gates["mix"][family]) for family in router["families"])
        table.add_row(label, *shares, format_number(gates["entropy"]))
    return table


def growth_table(growth: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each pair of checkpoints and noise expert."""
    title = "growth between checkpoints (net: less the floor; √steps: growth of a random walk)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("steps", "", "mean|w|", "net", "mean|B|", "update", "√steps", "cosine of updates"):
        table.add_column(name, justify="left" if name in ("steps", "") else "right")
    for entry in growth:
        for label, figures in entry.items():
            if isinstance(figures, Mapping):
                keys = ("legacy", "net", "mean_abs_B", "delta_norm", "sqrt_step")
                table.add_row(f"{entry['from_step']} - {entry['to_step']}", label,
                              *(format_change(figures[key]) for key in keys), format_number(figures["update_cosine"]))
    return table


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """A line for each rule; if it is not good, also its source and the advice."""
    lines = [f"verdict for {verdict['preset']}: {verdict['status']}"]
    for rule in verdict["rules"]:
        lines.append(f"  {rule['status']}  {rule['rule']}: {format_number(rule['value'])} (wanted {rule['threshold']})")
        if rule["status"] != "good":
            lines += [f"        from: {rule['source']}", f"        to do: {rule['action']}"]
    return lines + [f"  note  {note}" for note in verdict["notes"]]


def format_number(value: float | None) -> str:
    """Four digits; `-` if absent."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def format_short(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def format_share(share: float | None) -> str:
    """`25.0 %`."""
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def format_change(value: float | None) -> str:
    """`+11.8 %`."""
    return "-" if value is None else f"{value:+.1%}".replace("%", " %")
