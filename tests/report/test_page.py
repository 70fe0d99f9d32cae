"""Pages in a real browser: they open without errors and without the network, and their videos play in step."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from lapwan.report import page as pages
from lapwan.report import plots
from lapwan.report.page import Bilingual, Overlay, Page, VideoCell, VideoGrid, VideoRow, rich_table, write_page
from lapwan.sampling.video import write_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAMES, FPS, SIDE = 17, 16, 64
ARMS = ("base", "stage 1", "<b>stage 2</b>")
NASTY = "</script><img src=x onerror=alert(1)>\"'{{ 7*7 }} 电凝钩"


def moving(seed: int) -> np.ndarray:
    """A bright square that crosses the picture; its row depends on the seed."""
    frames = np.full((FRAMES, SIDE, SIDE, 3), (40, 10 * seed % 200, 60), np.uint8)
    for t, frame in enumerate(frames):
        frame[8 + seed * 5 % 40 :][:10, 3 * t : 3 * t + 10] = 240
    return frames


def grid_of(folder: Path, rows: int = 4) -> VideoGrid:
    """Rows of three arms whose videos lie in `folder`; the arms disagree in the even rows."""
    tip = tuple((0.1 + 0.04 * t, 0.5) for t in range(FRAMES))
    made = []
    for n in range(rows):
        cells = []
        for a, arm in enumerate(ARMS):
            path = folder / "videos" / f"{n} #{a}?.mp4"
            write_video(path, moving(3 * n + a), FPS)
            right = bool(n % 2) or a == 2
            cells.append(VideoCell(arm, path, overlay=Overlay(
                "hook 0.93" if right else "suction 0.61", right, (("scissors", 0.1), ("hook", 0.7), ("suction", 0.2)),
                "router", tip, (("identity", float(right)), ("motion", 1.0 + n * a), ("gone", float("nan"))))))
        made.append(VideoRow(f"{n}: {NASTY}", tuple(cells), ("hook", "suction")[n % 2], ("hook", "suction")[n % 2],
                             tip=tip))
    return VideoGrid(Bilingual("Videos", "视频"), tuple(made), FRAMES, FPS, (SIDE, SIDE))


def page_of(*grids: VideoGrid) -> Page:
    table = Table("adapter", "mean")
    table.add_row("identity %", "")
    table.add_row("base", "12.5 \\[1.0, 20.1]")
    line = {"high": [(0.0, 1.0), (1.0, 0.5)]}
    chart = plots.render(lambda figure: plots.line_chart(
        figure.subplots(), "loss", line, plots.NOISE_EXPERT_COLOURS, "step", "loss"), 6, 3)
    return Page("evaluate", Bilingual("Adapters compared", "适配器比较"), ((Bilingual("model", "模型"), "tiny (t2v)"),),
                (rich_table(table, Bilingual("Figures", "数据")), pages.Plot(Bilingual("Plot", "图"), chart), *grids,
                 pages.PageLinks(Bilingual("Files", "文件"), (("the plot", Path("/etc/passwd")),))),
                "lapwan evaluate --config settings.toml", "seed = 0")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page opened from its file; what it wrote to the console, and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, **how: Any) -> None:
        self.tab = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **how})
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())

    def js(self, expression: str) -> Any:
        return self.tab.evaluate(expression)

    def wait(self, expression: str) -> None:
        self.tab.wait_for_function(expression, timeout=20_000)

    def times(self) -> list[float]:
        """Where each video in view is, in frames."""
        times: list[float] = self.js(f"[...document.querySelectorAll('video[src]')].map(v => v.currentTime * {FPS})")
        return times


LOADED = ("[...document.querySelectorAll('video[src]')].length >= 6 && "
          "[...document.querySelectorAll('video[src]')].every(v => v.readyState >= 2 && !v.seeking)")


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("page")
    assert write_page(folder / "report.html", page_of(grid_of(folder)))
    shutil.rmtree(folder / "videos")  # they are in the page
    shown = Opened(browser, folder / "report.html")
    yield shown
    shown.tab.close()


def test_it_opens_without_errors_and_without_the_network(opened: Opened) -> None:
    opened.wait(LOADED)
    assert opened.faults == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert opened.js("document.querySelector('video').videoWidth") == SIDE
    assert opened.js("document.querySelector('.prompt').textContent") == f"0: {NASTY}"
    assert opened.js("document.querySelector('figcaption:nth-child(1)') && "
                     "document.querySelectorAll('figcaption')[2].textContent") == ARMS[2]
    assert "/etc/passwd" not in opened.tab.content()


def test_videos_advance_together(opened: Opened) -> None:
    opened.wait(LOADED)
    opened.js("play(false), seek(0), player.speed = 0.25, play(true)")  # far from the loop's end
    opened.wait("[...document.querySelectorAll('video[src]')].every(video => video.currentTime > 0.25)")
    assert opened.js("player.playing") and max(opened.times()) - min(opened.times()) < 5
    opened.tab.keyboard.press(" ")
    assert not opened.js("player.playing")
    for frame in (5, 6):  # a step of the keyboard shows the same frame of every video
        if frame == 5:
            opened.js("seek(5)")
        else:
            opened.tab.keyboard.press("ArrowRight")
        opened.wait(LOADED)
        assert {int(time) for time in opened.times()} == {frame}
        assert opened.tab.text_content("#time") == f"{frame + 1} / {FRAMES}"
    opened.tab.keyboard.press("ArrowLeft")
    opened.wait(LOADED)
    assert {int(time) for time in opened.times()} == {5}
    assert opened.js("document.querySelector('.point.seen').style.left") == "30%"  # the tip of frame 5


def test_filters_order_and_toggles(opened: Opened) -> None:
    shown = "[...document.querySelectorAll('article:not([hidden]) .prompt')].map(node => node.textContent[0]).join('')"
    assert opened.js(shown) == "0123"
    opened.tab.select_option("#family", "suction")
    assert opened.js(shown) == "13"
    opened.tab.select_option("#family", "")
    opened.tab.select_option("#verdicts", "differ")
    assert opened.js(shown) == "02" and "2 of 4" in opened.tab.text_content("#shown")
    opened.tab.select_option("#verdicts", "")
    opened.tab.select_option("#order", "motion")
    assert opened.js(shown) == "3210"
    opened.tab.select_option("#order", "")
    opened.tab.click("#language")
    assert opened.tab.text_content("h1") == "适配器比较" and "行" in opened.tab.text_content("#shown")
    opened.tab.click("#language")
    assert opened.tab.text_content("h1") == "Adapters compared"
    colours = [opened.js("getComputedStyle(document.body).backgroundColor")]
    opened.tab.click("#theme")
    colours.append(opened.js("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]
    opened.tab.click("#theme")
    opened.tab.keyboard.press("o")
    assert not opened.tab.is_visible(".verdict")
    opened.tab.keyboard.press("o")
    assert opened.tab.is_visible(".verdict") and opened.faults == []


def test_many_videos_are_beside_the_page_and_narrow_and_dark_fit(browser: Any, tmp_path, monkeypatch) -> None:
    """Beyond the budget the page links to the files, by names that a URL has to escape."""
    monkeypatch.setattr(pages, "_EMBEDDED", 10_000)
    outside = tmp_path / "outside.mp4"
    write_video(outside, moving(1), FPS)
    grid = grid_of(tmp_path / "run", rows=5)
    more = VideoRow("elsewhere", (VideoCell("x", outside, note="not below the page"),))
    write_page(tmp_path / "run" / "report.html", page_of(VideoGrid(
        grid.title, (*grid.rows, more), FRAMES, FPS, (SIDE, SIDE))))
    assert (tmp_path / "run" / "report.html").stat().st_size < 400_000
    shown = Opened(browser, tmp_path / "run" / "report.html", viewport={"width": 800, "height": 900},
                   color_scheme="dark")
    shown.wait(LOADED)
    assert shown.faults == [] and shown.js("document.documentElement.dataset.theme") == "dark"
    assert shown.js("document.documentElement.scrollWidth") <= 800
    assert "outside.mp4" not in shown.tab.content()
    shown.tab.close()


def test_only_a_page_of_lapwan_is_replaced(tmp_path, capsys) -> None:
    path = tmp_path / "report.html"
    assert write_page(path, page_of()) and write_page(path, page_of())
    path.write_text("<html>mine</html>")
    assert not write_page(path, page_of()) and path.read_text() == "<html>mine</html>"
    assert "is not a page of lapwan and stays" in capsys.readouterr().err


def test_the_rows_of_a_terminal_table(tmp_path) -> None:
    table = page_of().blocks[0]
    assert isinstance(table, pages.DataTable)
    assert table.rows == (("identity %",), ("base", "12.5 [1.0, 20.1]"))
    write_page(tmp_path / "r.html", page_of())
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
