"""`lapwan label`: instrument labels from captions, clip by clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.markup import escape
from rich.table import Table

from lapwan import console
from lapwan.console import PlanRow, count_text
from lapwan.data.clip_file import ClipFile, read_clips, shortened, to_line
from lapwan.data.clips import relocated
from lapwan.data.dropped_clips import dropped_lines
from lapwan.data.label_report import LabelReport
from lapwan.data.labels import CaptionLabeller, Label, round_weights
from lapwan.data.musubi_dataset import is_musubi, musubi_rows
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.data.taxonomy_check import TaxonomyUse, conflicts, use_of
from lapwan.errors import UserError
from lapwan.files import atomic_file, claim_output, write_text
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.label import LabelSettings

_FIELDS = ("instrument_label", "instrument_name", "instrument_logits", "instrument_taxonomy", "label_fallback")
_MEBIBYTE = 1 << 20
_FILE_WIDTH = 200
_SHOWN_DROPS = 8
_EXAMPLE_WIDTH = 32


def run(settings: LabelSettings, options: RunOptions) -> None:
    """Label every clip; print the distribution; write the labels, their settings, the report and the plot."""
    if settings.check_taxonomy is not None:
        _check_taxonomy(settings, settings.check_taxonomy)
        return
    assert settings.output is not None
    taxonomy = load_taxonomy(settings.taxonomy)
    clips = _open(settings)
    sidecar = settings.output.with_suffix(".settings.toml")
    _check_paths(settings, sidecar)
    claim_output(settings.output, options.overwrite)
    for extra in (settings.report, settings.plot):
        if extra is not None:
            claim_output(extra, options.overwrite)
    if options.dry_run:
        _plan(settings, clips, taxonomy)
        return
    report = LabelReport(taxonomy)
    with atomic_file(settings.output) as temporary:
        _label_all(settings, clips, taxonomy, report, temporary)
        if not report.clips:
            _fail_without_clips(settings, clips)
        if settings.strict and report.fallback:
            _write_report(settings, report)
            raise UserError(f"--strict: {report.fallback} of {report.clips} captions name no instrument "
                            f"({_lines(report)}); no labels written; name the instruments there, or leave --strict out")
    write_text(sidecar, to_toml(settings, "lapwan label --config reproduces the labels beside this file"))
    _write_report(settings, report)
    if settings.plot is not None:
        _draw(report, settings.plot)
    console.log(f"wrote {settings.output}")
    _show_drops(settings, clips)


def _draw(report: LabelReport, path: Path) -> None:
    from lapwan.report.plots import balance, family_labels, render

    families, missing = report.taxonomy.families, report.to_collect()
    labels = family_labels(report.taxonomy.keys, {family.key: family.names_zh[0] for family in families
                                                  if family.names_zh})
    image = render(lambda figure: balance(figure.subplots(), f"{report.clips} clips, {report.taxonomy.name}", labels,
                                          report.counts, [missing.get(name, 0) for name in report.names]),
                   6.4, 1.4 + 0.35 * len(families))
    with atomic_file(path) as temporary:
        image.save(temporary)


def _check_taxonomy(settings: LabelSettings, name: str) -> None:
    taxonomy = load_taxonomy(name)
    lines = conflicts(taxonomy)
    console.results.print(f"taxonomy {taxonomy.name}: {', '.join(taxonomy.keys)}", markup=False)
    for line in lines or ["nothing is ambiguous"]:
        console.results.print(f"  {line}", markup=False)
    result: dict[str, Any] = {"taxonomy": taxonomy.name, "conflicts": lines}
    if settings.clips is not None:
        clips = _open(settings)
        use = use_of(taxonomy, ((clip.location, clip.caption) for clip in clips))
        if not use.captions:
            _fail_without_clips(settings, clips)
        _show_use(use)
        result |= use.to_dict()
        for line in dropped_lines(clips.drops):
            console.log(line.strip())
    if settings.report is not None:
        write_text(settings.report, json.dumps(result, ensure_ascii=False, indent=2) + "\n")


def _show_use(use: TaxonomyUse) -> None:
    headings = {"phrase": "left", "family": "left", "matched": "right", "counted": "right", "such as": "left"}
    rows = [[entry.phrase, entry.family, str(entry.matched), str(entry.counted), entry.examples[0][:_EXAMPLE_WIDTH]]
            for entry in use.phrases.values()]
    _print_table(f"{use.captions} captions, {use.several} with several families", headings, rows)
    unused = ", ".join(f"{count} of {key}" for key, count in use.unused.items())
    console.results.print(f"phrases that no caption matches: {unused}", markup=False)
    for location, caption in use.silent:
        console.results.print(f"  no evidence: {location}: {shortened(caption)}", markup=False)


def _open(settings: LabelSettings) -> ClipFile:
    assert settings.clips is not None
    rows = musubi_rows(settings.clips, settings.caption_encoding) if is_musubi(settings.clips) else None
    return read_clips(settings.clips, False, settings.caption_encoding, settings.recursive, rows)


def _fail_without_clips(settings: LabelSettings, clips: ClipFile) -> NoReturn:
    if not clips.drops:
        raise UserError(f"{settings.clips} has no clips; expected one JSON object per line")
    first = clips.drops[0]
    raise UserError(f"{settings.clips}: none of its {count_text(len(clips.drops), 'clip')} can be labelled; "
                    f"{first.name}: {first.reason}")


def _show_drops(settings: LabelSettings, clips: ClipFile) -> None:
    """Say what was read otherwise than usual, and fail if a clip was left out and --skip-bad is not given."""
    for note in (*clips.notes, *clips.encoding_notes()):
        console.log(note)
    if not clips.drops:
        return
    for line in dropped_lines(clips.drops):
        console.log(line.strip())
    if not settings.skip_bad:
        raise UserError(f"{len(clips.drops)} of the clips could not be labelled: {clips.drops[0].name}: "
                        f"{clips.drops[0].reason}; all others are labelled; fix or remove them, or pass --skip-bad")


def _write_report(settings: LabelSettings, report: LabelReport) -> None:
    if settings.report is not None:
        write_text(settings.report, json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n")
    _show(report)


def _check_paths(settings: LabelSettings, sidecar: Path) -> None:
    assert settings.clips is not None and settings.output is not None
    source = settings.clips.resolve()
    if source.is_dir() and settings.output.suffix.lower() in (".txt", ".caption"):
        raise UserError(f"output {settings.output}: a {settings.output.suffix} file is a caption; name a .jsonl file")
    if settings.output.exists() and settings.output.samefile(source):  # also through a link
        raise UserError(f"output {settings.output} is the input itself; labelling in place is refused, "
                        "choose another output")
    if settings.report is not None:
        others = {source: "input", settings.output.resolve(): "output", sidecar.resolve(): "settings file"}
        if (same := others.get(settings.report.resolve())) is not None:
            raise UserError(f"report {settings.report} is the {same} itself; choose another path")


def _lines(report: LabelReport) -> str:
    numbers = [str(line) for line, _ in report.unmatched]
    more = ", …" if report.fallback > len(numbers) else ""
    return f"line{'s' if report.fallback > 1 else ''} {', '.join(numbers)}{more}"


def _plan(settings: LabelSettings, clips: ClipFile, taxonomy: Taxonomy) -> None:
    """Read and check every line without labelling it."""
    count = sum(1 for _ in clips)
    if not count:
        _fail_without_clips(settings, clips)
    console.show_plan([
        settings_row(settings, "taxonomy"), PlanRow("clips", f"{count_text(count, 'clip')} of {settings.clips}"),
        *(PlanRow("", note) for note in (*clips.notes, *clips.encoding_notes())),
        PlanRow("taxonomy", f"{taxonomy.name} ({', '.join(taxonomy.keys)})"), PlanRow("output", str(settings.output)),
        *(PlanRow("dropped", f"{drop.name}: {drop.reason}", detail=number >= _SHOWN_DROPS)
          for number, drop in enumerate(clips.drops))])
    console.show_settings(to_toml(settings))


def _label_all(
    settings: LabelSettings, clips: ClipFile, taxonomy: Taxonomy, report: LabelReport, output: Path
) -> None:
    labeller = CaptionLabeller(taxonomy)
    total = max(1, -(-clips.bytes_total // _MEBIBYTE))
    done = 0
    assert settings.output is not None
    # Relative paths are relative to the JSONL's folder, so they are rewritten if the output is in another one.
    source, target = clips.anchor.resolve().parent, settings.output.resolve().parent
    with output.open("w", encoding="utf-8", newline="\n") as file, console.progress("label", total, "MiB") as bar:
        for clip in clips:
            label = labeller.label(clip.caption)
            report.add(clip.line, clip.caption, label)
            report.relabelled += "instrument_label" in clip.data
            data = clip.data if source == target else relocated(clip.data, source, target)
            file.write(to_line(_labelled(data, label, settings.soft_labels, report.taxonomy.name)))
            if (now := clips.bytes_read // _MEBIBYTE) > done:
                bar.advance(now - done, clips=report.clips)
                done = now
        bar.advance(total - done, clips=report.clips)


def _labelled(data: dict[str, Any], label: Label, soft: bool, taxonomy: str) -> dict[str, Any]:
    """The clip's fields in their order, then the label; labels of an earlier run are replaced."""
    out = {key: value for key, value in data.items() if key not in _FIELDS}
    out["instrument_label"] = label.index
    out["instrument_name"] = label.name
    if soft:
        out["instrument_logits"] = round_weights(label.weights)
    out["instrument_taxonomy"] = taxonomy
    if label.fallback:
        out["label_fallback"] = True
    return out


def _show(report: LabelReport) -> None:
    _show_families(report)
    _show_cooccurrence(report)
    ratio = "none (a family has no clip)" if report.imbalance is None else f"{report.imbalance:.2f}"
    console.results.print(f"imbalance (largest/smallest): {ratio}   fallback: {report.fallback}")
    if report.unmatched:
        console.results.print(f"no instrument named in {report.fallback}, such as")
        for line, caption in report.unmatched:
            console.results.print(f"  line {line}: {shortened(caption)}", markup=False)
    for advice in report.advice():
        console.results.print(f"advice: {advice}", markup=False)
    for warning in report.warnings():
        console.warn(warning)
    if report.relabelled:
        console.log(f"{report.relabelled} clips already had a label; it was replaced")


def _show_families(report: LabelReport) -> None:
    headings = {"#": "right", "family": "left", "also": "left", "clips": "right", "share": "right", "weight": "right",
                "draw ×": "right"}
    rows = []
    for index, family in enumerate(report.taxonomy.families):
        count, clips = report.counts[index], max(report.clips, 1)
        rows.append([str(index), family.name, "/".join(family.names_zh), str(count), f"{count / clips:.1%}",
                     f"{report.weight[index] / clips:.3f}", f"{report.sampling_weights[family.name]:g}"])
    _print_table(f"{report.clips} clips, taxonomy {report.taxonomy.name}", headings, rows)


def _show_cooccurrence(report: LabelReport) -> None:
    if not any(n for i, row in enumerate(report.cooccurrence) for j, n in enumerate(row) if i != j):
        return
    keys = report.taxonomy.keys
    rows = [[key, *map(str, row)] for key, row in zip(keys, report.cooccurrence, strict=True)]
    _print_table("clips in which two families occur together", {"": "left"} | dict.fromkeys(keys, "right"), rows)


def _print_table(title: str, headings: dict[str, Any], rows: list[list[str]]) -> None:
    """A table aligned by display width (a Chinese character takes two columns), never cropped outside a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in headings.items():
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.results.print(title, markup=False)
    console.results.print(table, width=None if console.results.is_terminal else _FILE_WIDTH)
