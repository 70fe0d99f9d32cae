"""What holds for every caption and every taxonomy."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapwan.data.caption_text import ChineseSegmenter, units
from lapwan.data.labels import CaptionLabeller, resolve_hint, round_weights
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.errors import UserError

# Characters of instrument words; none occurs in the fillers, so a keyword arises only where the test puts one.
_HAN = "剪钩钳吸镊夹刀电凝极"
_LATIN = ["scissor", "hook", "grasper", "clip", "bag"]
_FILLERS = ["胆囊", "组织", "，", "。", " ", "缓慢", "liver", ", ", "术者", "向上"]
_DENIALS = ["未使用{}", "没有{}", "无需{}", "不使用{}", "未见任何{}", "{}未使用",
            "without {}", "no {}", "{} is not used", "never using the {}"]
_FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])

_phrases = st.one_of(
    st.text(_HAN, min_size=1, max_size=4),
    st.lists(st.sampled_from(_LATIN), min_size=1, max_size=2).map(" ".join),
)


@st.composite
def taxonomies(draw: st.DrawFn) -> Taxonomy:
    size = draw(st.integers(2, 5))
    words = draw(st.lists(_phrases, min_size=size, max_size=3 * size, unique_by=units))
    families: list[dict[str, Any]] = [{"key": f"family{i}", "keywords": words[i::size]} for i in range(size)]
    default = f"family{draw(st.integers(0, size - 1))}"
    return Taxonomy.from_dict({"name": "drawn", "default": default, "families": families})


@st.composite
def cases(draw: st.DrawFn) -> tuple[Taxonomy, str]:
    taxonomy = draw(taxonomies())
    keywords = [k for family in taxonomy.families for k in family.keywords]
    pieces = draw(st.lists(st.sampled_from(keywords + _FILLERS), max_size=12))
    return taxonomy, "".join(pieces)


@given(cases())
@_FEW
def test_weights_are_a_distribution_in_taxonomy_order(case: tuple[Taxonomy, str]) -> None:
    taxonomy, caption = case
    label = CaptionLabeller(taxonomy).label(caption)
    assert len(label.weights) == len(taxonomy.families)
    assert math.fsum(label.weights) == pytest.approx(1, abs=1e-12)
    assert all(0 <= weight <= 1 for weight in label.weights)
    assert math.fsum(round_weights(label.weights)) == pytest.approx(1, abs=1e-12)
    assert label.weights[label.index] == pytest.approx(max(label.weights))
    assert label.name == taxonomy.families[label.index].name
    # every family's weight comes from its own mentions, in the place of its own index
    total = math.fsum(m.weight for m in label.mentions)
    for index, family in enumerate(taxonomy.families):
        own = [m for m in label.mentions if m.family == index]
        assert {m.phrase for m in own} <= set(family.keywords)
        if not label.fallback:
            assert label.weights[index] == pytest.approx(math.fsum(m.weight for m in own) / total)


@given(cases(), st.randoms(use_true_random=False))
@_FEW
def test_order_of_families_only_permutes_the_weights(case: tuple[Taxonomy, str], random: Any) -> None:
    taxonomy, caption = case
    data = taxonomy.to_dict()
    order = list(range(len(taxonomy.families)))
    random.shuffle(order)
    shuffled = Taxonomy.from_dict({**data, "families": [data["families"][i] for i in order]})
    weights = CaptionLabeller(taxonomy).label(caption).weights
    assert CaptionLabeller(shuffled).label(caption).weights == pytest.approx([weights[i] for i in order])


@given(cases())
@_FEW
def test_no_keyword_counts_inside_a_longer_one(case: tuple[Taxonomy, str]) -> None:
    taxonomy, caption = case
    mentions = CaptionLabeller(taxonomy).label(caption).mentions
    spans = [(m.start, m.end) for m in mentions]
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    text = units(caption)
    edges = _word_edges(taxonomy, caption)
    for family in taxonomy.families:
        for keyword in family.keywords:
            wanted = units(keyword)
            for at in range(len(text) - len(wanted) + 1):
                end = at + len(wanted)
                if text[at:end] == wanted and at in edges and end in edges:
                    inside = [s for s in spans if at <= s[0] and s[1] <= end and s != (at, end)]
                    assert not inside, (keyword, mentions)


def _word_edges(taxonomy: Taxonomy, caption: str) -> set[int]:
    """Word boundaries by jieba itself over each run of Chinese characters, counted in units."""
    segmenter = ChineseSegmenter(k for family in taxonomy.families for k in family.keywords if not k.isascii())
    edges, at, run = {0}, 0, ""
    for unit in [*units(caption), ""]:
        if unit and "\u4e00" <= unit <= "\u9fff":
            run += unit
            continue
        for word in segmenter.words(run) if run else []:
            at += len(word)
            edges.add(at)
        run = ""
        edges.add(at := at + 1)
        edges.add(at - 1)
    return edges


@given(st.data())
@_FEW
def test_a_family_whose_every_mention_is_negated_disappears(data: st.DataObject) -> None:
    taxonomy = data.draw(taxonomies())
    family = data.draw(st.sampled_from(range(len(taxonomy.families))))
    others = [k for i, f in enumerate(taxonomy.families) if i != family for k in f.keywords]
    clauses = []
    for _ in range(data.draw(st.integers(1, 3))):
        keyword = data.draw(st.sampled_from(taxonomy.families[family].keywords))
        clauses.append(data.draw(st.sampled_from(_DENIALS)).format(keyword))
    for _ in range(data.draw(st.integers(0, 2))):
        clauses.append(data.draw(st.sampled_from(others)) + data.draw(st.sampled_from(["", "胆囊", " liver"])))
    caption = data.draw(st.sampled_from(["。", "，", "; ", ". "])).join(data.draw(st.permutations(clauses)))
    label = CaptionLabeller(taxonomy).label(caption)
    if label.fallback:
        assert label.index == taxonomy.default
    else:
        assert label.weights[family] == 0, (caption, label.mentions)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_a_label(text: str) -> None:
    label = _SURGICAL.label(text)
    assert math.fsum(label.weights) == pytest.approx(1)


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_hint_is_weights_or_one_clear_error(text: str) -> None:
    try:
        weights = resolve_hint(text, _SURGICAL.taxonomy)
    except UserError:
        return
    assert math.fsum(weights) == pytest.approx(1)


_SURGICAL = CaptionLabeller(load_taxonomy("surgical4"))
