"""`lapwan evaluate`: adapters compared on held-out clips at equal noise: losses, routing, videos, with intervals."""

from __future__ import annotations

import shlex
from pathlib import Path

from lapwan import console, files
from lapwan.commands.run_setup import output_lock, print_plan
from lapwan.console import PlanRow, count_text
from lapwan.errors import Interrupted, UserError
from lapwan.evaluation.judge_file import read_judge
from lapwan.evaluation.metrics import metric_names
from lapwan.evaluation.page import evaluation_page
from lapwan.evaluation.recipe import JudgeOf, make_study, open_store, write_results
from lapwan.evaluation.router_accuracy import ProbeSet
from lapwan.evaluation.study import Study, run_study
from lapwan.evaluation.tables import IntervalRule, tables
from lapwan.evaluation.video_judge import judge_for
from lapwan.models.base import Base
from lapwan.models.fingerprints import vae_fingerprint
from lapwan.models.spec import ModelSpec, Task, read_spec, task_with
from lapwan.report.page import PAGE_FILE, write_page
from lapwan.settings.base import RunOptions, to_toml
from lapwan.settings.evaluate import EvaluateSettings
from lapwan.settings.model import BaseModelSettings, ModelChoice
from lapwan.temporaries import discard_folder
from lapwan.tiny.evaluators import EmbeddedJudge, SceneJudge, probe_captions
from lapwan.tiny.model import tiny_folder
from lapwan.tiny.resolve import TINY, resolve_base
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS

FIRST_JUDGE = f"{TINY}-1"


def run(settings: EvaluateSettings, options: RunOptions) -> None:
    """Check everything, then measure; `--dry-run` stops after the checks."""
    with output_lock(settings.output, options):
        _run(settings, options)


def _run(settings: EvaluateSettings, options: RunOptions) -> None:
    out = settings.output
    if not settings.resume:
        if (out / "videos").is_dir() and not options.overwrite:
            raise UserError(f"output exists: {out}; pass --resume to continue it (finished videos that still match are "
                            "kept), --overwrite to start over, or choose another path")
        files.claim_output(out, options.overwrite)
    study = make_study(settings, _resolve, None, _probe_set, EMBEDDED_REWARD_KINDS, _judge_of(settings))
    print_plan(settings, _plan(study, settings), options)
    if options.dry_run:
        return
    if options.overwrite and not settings.resume:
        discard_folder(out / "videos")
    files.write_text(out / "settings.toml", to_toml(settings, "lapwan evaluate --config with this file repeats it"))
    try:
        _measure(settings, study)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished videos are kept in {out / 'videos'}", again="--resume") from None


def _measure(settings: EvaluateSettings, study: Study) -> None:
    out = settings.output
    store = open_store(study, out / "videos")
    results = run_study(study, store)
    interval = IntervalRule(settings.interval.samples, settings.interval.level, settings.seed)
    path = write_results(out, study, results, interval, store, settings.videos.sheet)
    for table in tables(study, results, interval):
        console.results.print(table)
    console.results.print(str(path), markup=False)
    repeat = shlex.join(["lapwan", "evaluate", "--config", str(out / "settings.toml"), "--overwrite"])
    page = evaluation_page(study, results, interval, store, repeat, to_toml(settings))
    if write_page(out / PAGE_FILE, page):
        console.log(f"page: {out / PAGE_FILE}")


def _resolve(model: ModelChoice | None, task: Task | None) -> Base:
    """The base that is named, or the embedded model; only `tiny` names a model for each task."""
    model = TINY if model is None else model
    name = model.model if isinstance(model, BaseModelSettings) else model
    return resolve_base(model, task if name == TINY else None)


def _judge_of(settings: EvaluateSettings) -> JudgeOf:
    """The judge that is named, its file read now, or the embedded model's of its scenes."""
    if settings.judge == FIRST_JUDGE:
        return lambda taxonomy, shape: SceneJudge()
    if settings.judge in (None, TINY):
        return lambda taxonomy, shape: EmbeddedJudge()
    path = Path(str(settings.judge))
    file = read_judge(path)
    return lambda taxonomy, shape: judge_for(file, path, taxonomy, settings.judge_ceiling, shape.fps)


def _probe_set(spec: ModelSpec) -> ProbeSet | None:
    """Captions of the embedded scenes, if the model is the embedded one: its text features are made for them."""
    embedded = read_spec(tiny_folder(task_with(spec.requires_image)))
    return probe_captions() if vae_fingerprint(spec) == vae_fingerprint(embedded) else None


def _plan(study: Study, settings: EvaluateSettings) -> list[PlanRow]:
    spec = study.arms[0].base.spec
    names = [arm.name for arm in study.arms]
    rows = [PlanRow("model", f"{spec.path} ({spec.task})"),
            PlanRow("adapters", f"{len(names)}: " + ("; " if any("," in name for name in names) else ", ").join(names))]
    if study.index is not None:
        plan = study.flow
        each = "" if spec.one_transformer else " of each noise expert"
        first = ", the first frame given clean" if plan.first_frame else ""
        rows.append(PlanRow("losses", f"{count_text(len(study.items), 'clip')} of {study.index.folder}, "
                                      f"{count_text(plan.draws, 'draw')} in each of {plan.bins} bins of sigma{each}, "
                                      f"the same for every adapter{first}"))
    if study.sampling is not None:
        s, count = study.sampling, len(study.clips) * study.sampling.seeds
        rows.append(PlanRow("videos", f"{count_text(len(study.clips), 'clip')} x {count_text(s.seeds, 'seed')} = "
                                      f"{count} per adapter, {s.batch_size} at a time, {s.shape.frames} frames "
                                      f"{s.shape.size[0]}x{s.shape.size[1]}, sampled in {s.steps} steps"))
        if study.judge is not None:
            named = settings.judge if settings.judge is not None else TINY
            rows.append(PlanRow("judge", f"{named}: {', '.join(study.judge.classes)}"))
        rows.append(PlanRow("metrics", ", ".join(metric_names(study.scorers)) or "none"))
    rows += [PlanRow("routing", f"{len(captions)} {name}") for name, captions in study.captions.items()]
    return [*rows, PlanRow("page", f"{PAGE_FILE}, for a browser: tables, plots"
                                   f"{', every video' if study.sampling is not None else ''}")]
