"""The progress of long work: on a terminal and in a file."""

from __future__ import annotations

import io
import time

import pytest

from lapwan import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("rate", "text"), [(3.2, "3.20 step/s"), (1.0, "1.00 step/s"), (0.08, "12.5 s/step")])
def test_what_takes_more_than_a_second_is_counted_in_seconds(rate: float, text: str) -> None:
    assert console.speed(rate, "step") == text


def test_a_terminal_shows_phase_speed_time_left_and_figures(monkeypatch) -> None:
    written = Terminal()
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with console.progress("sampling", 4) as bar:
        for _ in range(3):
            time.sleep(0.02)
            bar.advance(1, noise_expert="high", sigma=0.75)
    last = [line for line in written.getvalue().splitlines() if "sampling" in line][-1]
    assert " step " not in last  # once, with the speed
    for part in ("sampling", "3/4", "step/s", "<", "expert=high", "sigma=0.75"):
        assert part in last, last


def test_a_file_gets_the_last_line(capsys) -> None:
    with console.progress("latents", 2, "clip") as bar:
        bar.advance(2)
    line = capsys.readouterr().err
    assert line.startswith("latents: 2/2 clip, ") and "clip/s" in line


def test_the_first_steps_loading_is_not_counted(monkeypatch, capsys) -> None:
    clock = iter([0.0, 60.0, 62.0, 64.0])  # made, then each step: the first loads
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with console.progress("sampling", 3) as bar:
        for _ in range(3):
            bar.advance(1)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "sampling: 1/3 step, 60 s/step, 120 s left"
    assert last == "sampling: 3/3 step, 2 s/step"


def test_a_step_within_a_unit_is_told_before_the_first_unit_is_done(monkeypatch, capsys) -> None:
    clock = iter([0.0, 3.0, 6.0, 8.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with console.progress("videos", 2, "video") as bar:
        bar.advance(0, sampling="1/12")
        bar.advance(0, sampling="2/12")
        bar.advance(1)
        bar.advance(1)
    told, last = capsys.readouterr().err.splitlines()
    assert told == "videos: 0/2 video sampling=2/12"
    assert last == "videos: 2/2 video, 4.5 s/video"  # since the first step of sampling
