"""A whole evaluation: every arm on the same clips and draws, with one model loaded at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lapwan import console
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.arms import Arm
from lapwan.evaluation.clips import EvaluationClip
from lapwan.evaluation.flow_losses import FlowLosses, FlowPlan, flow_losses
from lapwan.evaluation.metrics import Judge, Scorer
from lapwan.evaluation.router_accuracy import ProbeSet, RoutingScores, family_probe, measure_probe, routing_scores
from lapwan.evaluation.videos import Sampling, Scores, VideoStore, ceilings, generate_and_score, request_for
from lapwan.memory.generation import Memory
from lapwan.models.base import Base
from lapwan.names import NoiseExpert, Precision
from lapwan.sampling.expert_mix import Mix
from lapwan.sampling.generator import Generator
from lapwan.train.clip_store import ClipStore
from lapwan.wan.transformer.compile import Compile


@dataclass(frozen=True)
class ExecutionOptions:
    """Device, precision and memory of an evaluation."""

    device: torch.device
    dtype: torch.dtype
    memory: Memory = "auto"
    compile: Compile = "auto"
    precision: Precision | None = None
    text_precision: Precision | None = None


@dataclass(frozen=True)
class Study:
    """The arms under comparison (the first one is the control), and the data to compare them on.

    `clips`, `sampling` and `scorers` are for videos; `index`, `items` and `flow` for losses; `captions`, by the name of
    their set, for routing; `probe` are captions to fit a linear probe of the text features on. `judge` is what the
    scorers ask, to be named beside the scores. `depends_on`: other inputs of stored scores, the weights of rewards and
    judge.
    """

    arms: Sequence[Arm]
    taxonomy: Taxonomy
    execution: ExecutionOptions
    clips: Sequence[EvaluationClip] = ()
    sampling: Sampling | None = None
    scorers: Sequence[Scorer] = ()
    ceiling_scorers: Sequence[Scorer] = ()  # those that are meaningful for a reconstruction of the clip
    index: CacheIndex | None = None
    items: Sequence[CachedItem] = ()
    flow: FlowPlan = field(default_factory=FlowPlan)
    captions: Mapping[str, Sequence[EvaluationClip]] = field(default_factory=dict)
    probe: ProbeSet | None = None
    judge: Judge | None = None
    depends_on: Sequence[str] = ()


@dataclass
class StudyResults:
    """All measurements, by arm."""

    losses: dict[str, dict[NoiseExpert, FlowLosses]] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    mixes: dict[str, list[Mix]] = field(default_factory=dict)  # of a mixture's experts, by clip
    ceiling: Scores = field(default_factory=dict)
    routing: dict[str, dict[str, RoutingScores]] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)


class GeneratorPool:
    """One generator at a time: arms on one model folder share what is loaded."""

    def __init__(self, execution: ExecutionOptions) -> None:
        self._execution = execution
        self._current: Generator | None = None

    def generator_for(self, base: Base) -> Generator:
        """The generator of a base's folder; that of another folder is freed first."""
        if self._current is None or self._current.spec.path != base.spec.path:
            self._current = None
            e = self._execution
            self._current = Generator(
                base, None, e.device, e.dtype, e.memory, e.compile, e.precision, e.text_precision,
                cache_conditions=True)
        return self._current


def run_study(study: Study, store: VideoStore | None = None) -> StudyResults:
    """Measure everything that the study asks for.

    Raises:
        UserError: a generation or a cache that is not possible.
    """
    results, generators = StudyResults(), GeneratorPool(study.execution)
    for arm in study.arms:
        generator = generators.generator_for(arm.base)
        if study.index is not None:
            results.losses[arm.name] = _losses(study, generator, arm)
        if study.clips and study.sampling is not None:
            results.scores[arm.name] = _videos(study, generator, arm, study.sampling, store)
            if arm.adapters.mixture is not None:
                requests = (request_for(arm.base.spec, arm, clip, study.sampling, 0) for clip in study.clips)
                results.mixes[arm.name] = [mix for mix in map(generator.route, requests) if mix is not None]
        if arm.routed and study.captions:
            results.routing[arm.name] = _routing(study, generator, arm)
    if study.ceiling_scorers and study.sampling is not None:
        generator = generators.generator_for(study.arms[0].base)
        results.ceiling = ceilings(
            generator, study.clips, study.sampling.shape, study.ceiling_scorers, study.sampling.batch_size)
    if study.probe is not None and results.routing:
        results.probe = _probe(study, study.probe, generators.generator_for(study.arms[0].base))
    return results


def _losses(study: Study, generator: Generator, arm: Arm) -> dict[NoiseExpert, FlowLosses]:
    assert study.index is not None
    plan, noise_experts = study.flow, len(arm.base.spec.noise_experts)
    clips = ClipStore(study.index, study.items, study.execution.device, len(study.taxonomy.families))
    forwards = len(study.items) * plan.bins * plan.draws * noise_experts
    with console.progress(f"{arm.name}: losses", forwards, "forward") as bar:
        return flow_losses(generator, arm, clips, plan, bar.advance)


def _videos(
    study: Study, generator: Generator, arm: Arm, sampling: Sampling, store: VideoStore | None
) -> Scores:
    with console.progress(f"{arm.name}: videos", len(study.clips) * sampling.seeds, "video") as bar:
        return generate_and_score(generator, arm, study.clips, sampling, study.scorers, store, bar.advance)


def _routing(study: Study, generator: Generator, arm: Arm) -> dict[str, RoutingScores]:
    mixture = arm.adapters.mixture
    assert mixture is not None
    scores = {}
    for name, captions in study.captions.items():
        labelled = [clip for clip in captions if not clip.fallback]
        features = [generator.text_features(clip.prompt).cpu() for clip in labelled]
        scores[name] = routing_scores(mixture, features, [clip.weights for clip in labelled])
    return scores


def _probe(study: Study, probe_set: ProbeSet, generator: Generator) -> dict[str, float]:
    """Accuracy of a linear probe on its held-out captions and, fitted on all of them, on each set of captions."""

    def encode(texts: Sequence[str]) -> list[torch.Tensor]:
        return [generator.text_features(text).cpu() for text in texts]

    with console.progress("text probe", 2 + len(study.captions), "part") as bar:
        features = encode([caption.text for caption in probe_set.captions])
        accuracy = {probe_set.name: measure_probe(probe_set.captions, features).held_out}
        bar.advance()
        probe = family_probe(probe_set.captions, features, study.taxonomy)
        bar.advance()
        for name, captions in study.captions.items():
            labelled = [clip for clip in captions if not clip.fallback]
            truth_N = np.array([int(np.argmax(clip.weights)) for clip in labelled])
            accuracy[name] = float((probe.predict(encode([clip.prompt for clip in labelled])) == truth_N).mean())
            bar.advance()
    return accuracy


def check_taxonomies(arms: Sequence[Arm], default: Taxonomy) -> Taxonomy:
    """The taxonomy of the arms' mixtures, or the default without mixtures.

    Raises:
        UserError: mixtures of different taxonomies.
    """
    taxonomies = {arm.name: Taxonomy.from_dict(arm.adapters.mixture.taxonomy) for arm in arms
                  if arm.adapters.mixture is not None}
    if len({taxonomy.keys for taxonomy in taxonomies.values()}) > 1:
        families = "; ".join(f"{name}: {', '.join(taxonomy.keys)}" for name, taxonomy in taxonomies.items())
        raise UserError(f"the mixtures have different families ({families}); evaluate them separately")
    return next(iter(taxonomies.values()), default)
