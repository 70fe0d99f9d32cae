"""`lapwan train-judge`: from a cache's labels and boxes to a judge of videos, with the figures that it is worth."""

from __future__ import annotations

from rich import box
from rich.table import Table

from lapwan import console
from lapwan.caching.read import load_index
from lapwan.commands.run_setup import print_plan
from lapwan.console import PlanRow, count_text, listed
from lapwan.data.taxonomy import load_taxonomy
from lapwan.evaluation.judge_data import PARTS, JudgePlan, plan_judge
from lapwan.evaluation.judge_file import LEAST_IDENTITY, JudgeMetadata, failed_ceiling, write_judge
from lapwan.evaluation.judge_recipe import make_judge
from lapwan.evaluation.judge_training import JudgeTraining
from lapwan.files import claim_output
from lapwan.models.device import pick_device
from lapwan.models.spec import task_named
from lapwan.settings.base import RunOptions
from lapwan.settings.train_judge import TrainJudgeSettings
from lapwan.tiny.resolve import TINY, resolve
from lapwan.train.clip_store import check_cache
from lapwan.wan.vae import load_vae


def run(settings: TrainJudgeSettings, options: RunOptions) -> None:
    """Check the cache, train, measure, write; `--dry-run` stops after the checks."""
    claim_output(settings.output, options.overwrite)
    device = pick_device(settings.device)
    index = load_index(settings.cache, settings.labels)
    spec = resolve(TINY if settings.model is None else settings.model, task_named(index.task))
    check_cache(index, spec, index.items)
    plan = plan_judge(index, load_taxonomy(settings.taxonomy), settings.size, settings.frames,
                      settings.unlabelled == "none", settings.group, settings.clips)
    print_plan(settings, _rows(plan, settings), options)
    if options.dry_run:
        return
    training = JudgeTraining(settings.steps, settings.batch_size, settings.lr, seed=settings.seed)
    net, metadata = make_judge(plan, load_vae(spec, device=device), training, settings.sources, device)
    write_judge(settings.output, net, metadata)
    console.results.print(_table(metadata))
    if (reason := failed_ceiling(metadata, LEAST_IDENTITY)) is not None:
        console.warn(f"evaluate will refuse this judge: {reason}; train it on more clips")
    console.results.print(str(settings.output), markup=False)


def _rows(plan: JudgePlan, settings: TrainJudgeSettings) -> list[PlanRow]:
    groups = len({item.group for item in plan.items})
    families = plan.by_family()
    rows = [
        PlanRow("clips", f"{count_text(len(plan.items), 'clip')} of {count_text(groups, 'source video')}: "
                         + ", ".join(f"{plan.count(part)} to {part}" for part in PARTS)),
        PlanRow("families", ", ".join(f"{key} {count}" for key, count in families.items()) + " (that train)"),
        PlanRow("network", f"sees {plan.canvas.height}x{plan.canvas.width}, {plan.frames} frames a clip, "
                           f"{count_text(settings.steps, 'step')} of {settings.batch_size} frames")]
    if plan.left_out:
        rows.append(PlanRow("left out", f"{count_text(plan.left_out, 'clip')} without label and boxes; --unlabelled "
                                        "none if they show no instrument"))
    if missing := [key for key, count in families.items() if not count]:
        rows.append(PlanRow("note", f"no clip to train on shows {listed(missing)}: evaluate refuses such clips"))
    return rows


def _table(metadata: JudgeMetadata) -> Table:
    """The judge's figures on the source videos that it was not trained on."""
    figures = metadata.figures
    table = Table(title="on source videos that it was not trained on", title_justify="left", box=box.SIMPLE)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, title in (("reconstructed", "the VAE's reconstructions: the ceiling"), ("source", "the source files")):
        if f"identity_{name}" in figures:
            low, high = figures[f"identity_{name}_ci95"] or (0.0, 1.0)
            table.add_row(f"instruments named, {title}", f"{_percent(figures[f'identity_{name}'])} "
                          f"[{100 * low:.0f}, {100 * high:.0f}] of {figures[f'videos_{name}']}")
            table.add_row("  tip within 5 % of the diagonal", _percent(figures[f"tip_accuracy_{name}"]))
    for state in ("none", "unclear"):
        wrong = figures[f"false_positives_{state}"].get("any", float("nan"))
        table.add_row(f"{state}: precision, recall", f"{_percent(figures[f'{state}_precision'])}, "
                                                     f"{_percent(figures[f'{state}_recall'])}")
        table.add_row(f"  an instrument is seen in {state}", f"{_percent(wrong)} of {figures[f'videos_{state}']}")
    table.add_row("calibration: ECE", f"{figures['ece']:.3f} of {figures['videos']}")
    for confidence, right, count in figures["reliability"]:
        table.add_row(f"  confidence {100 * confidence:.0f} %", f"{_percent(right)} right of {count}")
    return table


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.1f} %"
