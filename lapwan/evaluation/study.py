"""A whole evaluation: every arm on the same clips and draws, one model loaded at a time."""

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
from lapwan.evaluation.engine import Sampling, Scores, ceilings, generate_and_score
from lapwan.evaluation.flow import FlowLosses, FlowPlan, flow_losses
from lapwan.evaluation.metrics import Scorer
from lapwan.evaluation.routing import ProbeSet, RoutingScores, family_probe, measure_probe, routing_scores
from lapwan.evaluation.store import VideoStore
from lapwan.memory.generation import Memory
from lapwan.models.base import Base
from lapwan.names import NoiseExpert, Precision
from lapwan.sampling.batch import BatchGenerator
from lapwan.train.clip_store import ClipStore
from lapwan.wan.transformer.compile import Compile


@dataclass(frozen=True)
class Machine:
    """Where and how an evaluation computes."""

    device: torch.device
    dtype: torch.dtype
    memory: Memory = "auto"
    compile: Compile = "auto"
    precision: Precision | None = None
    text_precision: Precision | None = None


@dataclass(frozen=True)
class Study:
    """What is compared (the first arm is what the others are held against), and on what.

    `clips` with `sampling` and `scorers` are for videos; `index` with `items` and `flow` for losses; `captions` by the
    name of their set for routing, and `probe` the captions that a linear probe of the text features beside it is
    fitted on. `decides`: what kept scores depend on besides, the weights of rewards and judge.
    """

    arms: Sequence[Arm]
    taxonomy: Taxonomy
    machine: Machine
    clips: Sequence[EvaluationClip] = ()
    sampling: Sampling | None = None
    scorers: Sequence[Scorer] = ()
    bounded: Sequence[Scorer] = ()  # those of them that mean something on a reconstruction of the clip itself
    index: CacheIndex | None = None
    items: Sequence[CachedItem] = ()
    flow: FlowPlan = field(default_factory=FlowPlan)
    captions: Mapping[str, Sequence[EvaluationClip]] = field(default_factory=dict)
    probe: ProbeSet | None = None
    decides: Sequence[str] = ()


@dataclass
class Findings:
    """Everything measured, by arm."""

    losses: dict[str, dict[NoiseExpert, FlowLosses]] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    ceiling: Scores = field(default_factory=dict)
    routing: dict[str, dict[str, RoutingScores]] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)


class Generators:
    """One generator at a time: arms on one model folder share what is loaded."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._current = machine, None

    _current: BatchGenerator | None

    def on(self, base: Base) -> BatchGenerator:
        """The generator of a base's folder; another folder's is let go first."""
        if self._current is None or self._current.spec.path != base.spec.path:
            self._current = None
            m = self._machine
            self._current = BatchGenerator(
                base, None, m.device, m.dtype, m.memory, m.compile, m.precision, m.text_precision)
        return self._current


def run_study(study: Study, store: VideoStore | None = None) -> Findings:
    """Measure everything that the study asks for.

    Raises:
        UserError: what a generation or a cache refuses.
    """
    found, generators = Findings(), Generators(study.machine)
    for arm in study.arms:
        generator = generators.on(arm.base)
        if study.index is not None:
            found.losses[arm.name] = _losses(study, generator, arm)
        if study.clips and study.sampling is not None:
            found.scores[arm.name] = _videos(study, generator, arm, study.sampling, store)
        if arm.routed and study.captions:
            found.routing[arm.name] = _routing(study, generator, arm)
    if study.bounded and study.sampling is not None:
        generator = generators.on(study.arms[0].base)
        found.ceiling = ceilings(
            generator, study.clips, study.sampling.shape, study.bounded, study.sampling.batch_size)
    if study.probe is not None and found.routing:
        found.probe = _probe(study, study.probe, generators.on(study.arms[0].base))
    return found


def _losses(study: Study, generator: BatchGenerator, arm: Arm) -> dict[NoiseExpert, FlowLosses]:
    assert study.index is not None
    plan, noise_experts = study.flow, len(arm.base.spec.noise_experts)
    clips = ClipStore(study.index, study.items, study.machine.device, len(study.taxonomy.families))
    with console.progress(f"{arm.name}: losses", len(study.items) * plan.bins * plan.draws * noise_experts, "forward") as bar:
        return flow_losses(generator, arm, clips, plan, bar.advance)


def _videos(
    study: Study, generator: BatchGenerator, arm: Arm, sampling: Sampling, store: VideoStore | None
) -> Scores:
    with console.progress(f"{arm.name}: videos", len(study.clips) * sampling.seeds, "video") as bar:
        return generate_and_score(generator, arm, study.clips, sampling, study.scorers, store, bar.advance)


def _routing(study: Study, generator: BatchGenerator, arm: Arm) -> dict[str, RoutingScores]:
    mixture = arm.adapters.mixture
    assert mixture is not None
    found = {}
    for name, captions in study.captions.items():
        known = [clip for clip in captions if not clip.fallback]
        features = [generator.text_features(clip.prompt).cpu() for clip in known]
        found[name] = routing_scores(mixture, features, [clip.weights for clip in known])
    return found


def _probe(study: Study, probe_set: ProbeSet, generator: BatchGenerator) -> dict[str, float]:
    """What a linear probe reads: of its own held-out captions, and, fitted on all of them, of each set to route."""

    def encode(texts: Sequence[str]) -> list[torch.Tensor]:
        return [generator.text_features(text).cpu() for text in texts]

    with console.progress("text probe", 2 + len(study.captions), "part") as bar:
        features = encode([caption.text for caption in probe_set.captions])
        shares = {probe_set.name: measure_probe(probe_set.captions, features).held_out}
        bar.advance()
        probe = family_probe(probe_set.captions, features, study.taxonomy)
        bar.advance()
        for name, captions in study.captions.items():
            known = [clip for clip in captions if not clip.fallback]
            truth = np.array([int(np.argmax(clip.weights)) for clip in known])
            shares[name] = float((probe.answers(encode([clip.prompt for clip in known])) == truth).mean())
            bar.advance()
    return shares


def check_taxonomies(arms: Sequence[Arm], said: Taxonomy) -> Taxonomy:
    """The taxonomy of the arms' mixtures, else the one said.

    Raises:
        UserError: mixtures of different taxonomies.
    """
    found = {arm.name: Taxonomy.from_dict(arm.adapters.mixture.taxonomy) for arm in arms
             if arm.adapters.mixture is not None}
    keys = {taxonomy.keys for taxonomy in found.values()}
    if len(keys) > 1:
        told = "; ".join(f"{name}: {', '.join(taxonomy.keys)}" for name, taxonomy in found.items())
        raise UserError(f"the mixtures have different families ({told}); evaluate them apart")
    return next(iter(found.values()), said)
