"""Faults made on purpose: a seeded share of what `tests/bench/faults.py` tries, and, marked slow, all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import COMMANDS, Call, Kind, kinds, make_template, select
from disturb import WORKS, can_mount, full_disk, levels, measure, signalled, two_writers
from inputs import try_kind
from trial import ROOT, Outcome, Server, changes, refusal_faults

BENCH = ROOT / "tests" / "bench" / "faults.py"
SHARE = 22  # kinds of bad input in every run of the tests
BY_NAME = {work.name: work for work in WORKS}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("faults") / "template")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def test_the_kinds_are_enough():
    assert len(kinds()) >= 1000
    assert {kind.call.command for kind in kinds()} == set(COMMANDS)
    assert len({kind.damage.name for kind in kinds() if kind.damage}) >= 150


@pytest.mark.parametrize("kind", select(kinds(), SHARE, seed=1), ids=lambda kind: kind.name.replace("/", "|")[:120])
def test_bad_input_is_one_line_and_changes_nothing(server: Server, template: Path, tmp_path: Path, kind: Kind):
    result = try_kind(server, template, tmp_path / "trial", kind, seed=1)
    assert not result.faults, result.outcome.err[-2000:]


def test_a_full_disk_is_one_line_and_the_work_goes_on(server: Server, template: Path, tmp_path: Path):
    if not can_mount():
        pytest.skip("mounting a tmpfs needs root")
    reference = measure(server, template, tmp_path / "undisturbed", BY_NAME["merge file"])
    trial = full_disk(server, template, tmp_path / "trial", reference, pages=reference.bytes // 8192)
    assert not trial.finished and not trial.faults


def test_a_killed_run_and_a_second_writer(server: Server, template: Path, tmp_path: Path):
    reference = measure(server, template, tmp_path / "undisturbed", BY_NAME["train-lora"])
    for trial in (signalled(server, template, tmp_path / "killed", reference, "kill -9", 0.6),
                  signalled(server, template, tmp_path / "ended", reference, "SIGTERM", 0.5),
                  two_writers(server, template, tmp_path / "two", reference, 0.2)):
        assert not trial.faults


def test_a_reader_that_is_fuzzed(tmp_path: Path):
    program = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "cache index", "--seconds", "2", "--out",
               str(tmp_path)]
    ran = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0, ran.stderr
    assert rows[-1]["readings"] > 10
    assert [row for row in rows if "key" in row] == []


def test_what_counts_as_right():
    """The judge sees what it is for."""
    right = Outcome(2, "", "loading\nerror: x.json is damaged; download it again\n", 1, 1, 400)
    assert refusal_faults(right) == []
    for changed in (
        {"code": 1}, {"code": 0}, {"code": None}, {"err": "error: a\nerror: b\n"}, {"err": "error: a\nb\n"},
        {"err": "error: a\x1b[31m\n"}, {"err": "nothing\n"}, {"cpu": 11}, {"rss_mib": 1200}, {"orphans": ["python"]},
        {"err": "Traceback (most recent call last):\n  x\nKeyError: 1\n", "code": 1}, {"err": f"error: {'x' * 3000}\n"},
    ):
        assert refusal_faults(Outcome(**{**vars(right), **changed})), changed
    before = {"a": ("file", 1, 2, 3), "out/b": ("file", 1, 2, 3)}
    call = Call("x", ("label",), output=("out",), folder=True)
    kind = Kind("x", call)
    assert changes(before, before, kind.may_write) == []
    assert changes(before, {**before, "work/out/c": ("file", 1, 1, 1)}, kind.may_write) == []
    for after in ({"a": ("file", 2, 2, 3), "out/b": before["out/b"]}, {"out/b": before["out/b"]},
                  {**before, "work/c": ("file", 1, 1, 1)}, {**before, "work/out/.lapwan-tmp-1-c": ("file", 1, 1, 1)}):
        assert changes(before, after, kind.may_write), after


@pytest.mark.slow
@pytest.mark.parametrize("section", ["inputs", "disks", "signals", "writers", "flat", "label", "fuzz"])
def test_all_faults(section: str, tmp_path: Path):
    ran = subprocess.run([sys.executable, str(BENCH), "--what", section, "-o", str(tmp_path / "faults.md")])
    assert ran.returncode == 0, (tmp_path / "faults.txt").read_text(encoding="utf-8")


def test_small_disks_are_smaller_than_what_is_written():
    from random import Random

    from disturb import Reference

    reference = Reference(WORKS[0], 1.0, 40 * 4096, {}, {})
    assert all(1 <= pages < 40 for pages in levels(reference, 10, Random(0)))
