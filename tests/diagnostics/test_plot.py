"""The picture of inspect-weights: it shows what is there, and nothing where nothing is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from lapwan.commands.inspect_weights import run
from lapwan.diagnostics.lora_figures import ModuleFigures, summarise
from lapwan.diagnostics.plot import draw_plot
from lapwan.diagnostics.verdict import PRESETS
from lapwan.errors import UserError
from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.report import plots
from lapwan.settings.base import RunOptions
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.settings.load import load

GREY = tuple(bytes.fromhex(plots.MISSING[1:]))


def module(path: str, norm: float) -> ModuleFigures:
    return ModuleFigures(path, 4, 80, 80, 10.0, norm, 8.0, norm, norm / 2, 2.0, 3.0, True)


def area(image: Image.Image, colour: tuple[int, ...]) -> int:
    """Pixels of this colour."""
    return sum(count for count, pixel in image.getcolors(1 << 24) if pixel == colour)


def test_charts_appear_only_over_time_and_grey_only_where_modules_are_missing():
    full = [module(f"blocks.{b}.attn1.to_{p}", 1.0 + b) for b in range(3) for p in "qkv"]
    half = [replace(m, sum_abs_b=m.sum_abs_b / 2, delta_norm=m.delta_norm / 4) for m in full]
    figures = {"high": summarise(full), "low": summarise(half)}
    one = draw_plot([100], [figures], {"high": full, "low": full}, PRESETS["motion"])
    two = draw_plot([100, 200], [figures, figures], {"high": full, "low": full}, PRESETS["motion"])
    assert two.height > one.height and one.width == two.width
    green = tuple(bytes.fromhex(plots.GREEN[1:]))  # the line of mean|B|'s ratio
    assert area(two, green) > 20 and area(one, green) == 0
    partial = draw_plot([100], [figures], {"high": full, "low": full[:5]}, PRESETS["motion"])
    broken = draw_plot([100], [figures], {"high": full, "low": [replace(full[0], finite=False), *full[1:]]},
                     PRESETS["motion"])
    edges = area(one, GREY)  # of text
    assert area(partial, GREY) > edges + 15000 and area(broken, GREY) > edges + 3000
    assert one.tobytes() == draw_plot([100], [figures], {"high": full, "low": full}, PRESETS["motion"]).tobytes()


def test_the_command_writes_it(tmp_path, capsys):
    state = AdapterState({"blocks.0.attn1.to_q": LowRank(torch.randn(2, 6), torch.randn(6, 2), 2.0)})
    write_lora(tmp_path / "a_high.safetensors", state)
    options = {"files": [str(tmp_path / "a_high.safetensors")], "plot": str(tmp_path / "p.png"),
               "page": str(tmp_path / "p.html")}
    run(load(InspectWeightsSettings, options=options, environment={}), RunOptions())
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and image.width == 1650
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "verdict for motion" in page and "norm of the update" in page and page.count("data:image/png") == 1
    with pytest.raises(UserError, match="output exists"):
        run(load(InspectWeightsSettings, options=options, environment={}), RunOptions())
    with pytest.raises(UserError, match=r"must be a \.png file"):
        load(InspectWeightsSettings, options={**options, "plot": "x.pdf"}, environment={})
