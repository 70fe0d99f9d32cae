"""The picture of inspect-weights: it shows what is there, and nothing where nothing is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapwan.commands.inspect_weights import run
from lapwan.diagnostics.lora_figures import ModuleFigures, summarise
from lapwan.diagnostics.plot import draw_plot
from lapwan.diagnostics.verdict import PRESETS
from lapwan.errors import UserError
from lapwan.lora.formats import write_lora
from lapwan.lora.state import LoraEntry, LoraState
from lapwan.report.canvas import Box, Canvas, ramp, ticks
from lapwan.settings.base import RunOptions
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.settings.load import load

GREY = (240, 240, 240)


def module(path: str, norm: float) -> ModuleFigures:
    return ModuleFigures(path, 4, 80, 80, 10.0, norm, 8.0, norm, norm / 2, 2.0, 3.0, True)


def area(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """Pixels of this colour, give or take what scaling down does to a line."""
    return sum(count for count, found in image.getcolors(1 << 24)
               if max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 12)


@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e6))
def test_ticks_enclose_the_range_in_round_even_steps(low: float, share: float):
    span = max(1.0, abs(low)) * share
    got = ticks(low, low + span)
    step = got[1] - got[0]
    assert got[0] <= low + 1e-6 * span and got[-1] >= low + span * (1 - 1e-6) and 2 <= len(got) <= 9
    assert all(b - a == pytest.approx(step, rel=1e-4) for a, b in itertools.pairwise(got))
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")


def test_ticks_of_one_value_leave_room_around_it():
    for value in (0.0, 3.0, -2e-9, 5e5):
        got = ticks(value, value)
        assert got[0] < value < got[-1]


def test_ramp_runs_from_dark_to_light():
    brightness = [sum(ramp(n / 20)) for n in range(21)]
    assert brightness == sorted(brightness) and ramp(-1) == ramp(0) and ramp(2) == ramp(1)


def test_heat_map_puts_each_value_in_its_cell():
    canvas = Canvas(300, 300)
    values = {("0", "a"): 0.0, ("0", "b"): 1.0, ("1", "a"): 0.5}
    canvas.heat_map(Box(0, 0, 300, 300), "t", ["a", "b"], ["0", "1"], values, 1.0)
    image = canvas.finish()
    centres = {("0", "a"): (100, 60), ("0", "b"): (230, 60), ("1", "a"): (100, 160), ("1", "b"): (230, 160)}
    for cell, at in centres.items():
        want = ramp(values[cell]) if cell in values else GREY
        assert max(abs(p - q) for p, q in zip(image.getpixel(at), want, strict=True)) <= 2, cell


def test_charts_appear_only_over_time_and_grey_only_where_modules_are_missing():
    full = [module(f"blocks.{b}.attn1.to_{p}", 1.0 + b) for b in range(3) for p in "qkv"]
    half = [replace(m, sum_abs_b=m.sum_abs_b / 2, delta_norm=m.delta_norm / 4) for m in full]
    figures = {"high": summarise(full), "low": summarise(half)}
    one = draw_plot([100], [figures], {"high": full, "low": full}, PRESETS["motion"])
    two = draw_plot([100, 200], [figures, figures], {"high": full, "low": full}, PRESETS["motion"])
    assert two.height > one.height and one.width == two.width
    green = (20, 130, 110)  # the line of mean|B|'s ratio
    assert area(two, green) > 20 and area(one, green) == 0
    partial = draw_plot([100], [figures], {"high": full, "low": full[:5]}, PRESETS["motion"])
    broken = draw_plot([100], [figures], {"high": full, "low": [replace(full[0], finite=False), *full[1:]]},
                     PRESETS["motion"])
    edges = area(one, GREY)  # of text
    assert area(partial, GREY) > edges + 15000 and area(broken, GREY) > edges + 3000


def test_the_command_writes_it(tmp_path, capsys):
    state = LoraState({"blocks.0.attn1.to_q": LoraEntry(torch.randn(2, 6), torch.randn(6, 2), 2.0)})
    write_lora(tmp_path / "a_high.safetensors", state)
    options = {"files": [str(tmp_path / "a_high.safetensors")], "plot": str(tmp_path / "p.png")}
    run(load(InspectWeightsSettings, options=options, environment={}), RunOptions())
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and image.width == 1100
    with pytest.raises(UserError, match="output exists"):
        run(load(InspectWeightsSettings, options=options, environment={}), RunOptions())
    with pytest.raises(UserError, match=r"FILE\.png"):
        load(InspectWeightsSettings, options={**options, "plot": "x.pdf"}, environment={})
