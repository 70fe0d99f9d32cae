"""`lapwan label` from the command line: what it writes, says and refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran
from rich.cells import cell_len

from lapwan.data.clips import resolve_video

CLIPS = [
    {"video_path": "a.mp4", "caption": "抓钳抓取标本袋", "duration": 3, "source": "cholec36"},
    {"caption": "抓钳固定。电凝钩切割。", "video_path": "b.mp4", "extra": {"b": [1.5, None], "a": "é"}},
    {"video_path": "c.mp4", "caption": "腹腔镜视野", "split": "train"},
    {"video_path": "d.mp4", "caption": "The scissors cut the duct"},
]
Run = Callable[..., Ran]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(clip, ensure_ascii=False) + "\n" for clip in CLIPS), encoding="utf-8")
    return path


@pytest.fixture
def label(lapwan: Run) -> Run:
    return partial(lapwan, "label")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_labels_are_added_after_what_was_there(clips: Path, label: Run, tmp_path: Path) -> None:
    out = tmp_path / "out" / "labels.jsonl"
    assert label(clips, "-o", out).code == 0
    written = rows(out)
    added = ["instrument_label", "instrument_name", "instrument_logits", "instrument_taxonomy"]
    for clip, row in zip(CLIPS, written, strict=True):
        assert list(row)[: len(clip)] == list(clip)
        assert {key: row[key] for key in clip} == clip
        assert math.fsum(row["instrument_logits"]) == pytest.approx(1, abs=1e-12)
    assert list(written[0])[4:] == added
    assert list(written[2])[3:] == [*added, "label_fallback"]
    assert [row["instrument_label"] for row in written] == [3, 1, 3, 0]
    assert [row["instrument_name"] for row in written] == ["Other", "Hook/Electrocautery", "Other", "Scissors"]
    assert written[1]["instrument_logits"] == [0, 0.648, 0, 0.352]
    assert "抓钳抓取标本袋" in out.read_text(encoding="utf-8")
    assert not list(tmp_path.rglob(".lapwan-tmp-*"))


def test_relative_paths_still_lead_to_the_clips_from_another_folder(clips: Path, label: Run, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    out = tmp_path / "deep" / "er" / "labels.jsonl"
    assert label(clips, "-o", out).code == 0
    first, second, *_ = rows(out)
    assert first["video_path"] == "../../a.mp4" and resolve_video(first["video_path"], out).samefile(tmp_path / "a.mp4")
    assert second["video_path"] == "b.mp4"  # there is no such file: what it means is not ours to guess


def test_hard_labels_and_another_taxonomy(clips: Path, label: Run, tmp_path: Path) -> None:
    soft, hard = tmp_path / "soft.jsonl", tmp_path / "hard.jsonl"
    assert label(clips, "-o", soft).code == 0
    # relabelling replaces every trace of the earlier labels
    assert label(soft, "-o", hard, "--hard-labels", "--taxonomy", "cholec6").code == 0
    written = rows(hard)
    assert all("instrument_logits" not in row for row in written)
    assert [row["instrument_name"] for row in written] == ["Grasper", "Hook", "Grasper", "Scissors"]
    assert [row["instrument_label"] for row in written] == [2, 3, 2, 5]
    assert [row.get("label_fallback") for row in written] == [None, None, True, None]


def test_a_taxonomy_of_ones_own(clips: Path, label: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('default = "rest"\n[[families]]\nkey = "cut"\nkeywords = ["scissors", "电凝钩"]\n'
                    '[[families]]\nkey = "rest"\n', encoding="utf-8")
    assert label(clips, "-o", tmp_path / "l.jsonl", "--taxonomy", mine).code == 0
    assert [row["instrument_label"] for row in rows(tmp_path / "l.jsonl")] == [1, 0, 1, 0]


def test_report_has_the_keys_scripts_rely_on(clips: Path, label: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert label(clips, "-o", tmp_path / "l.jsonl", "--report", report).code == 0
    data = json.loads(report.read_text(encoding="utf-8"))
    assert data["clips"] == 4
    assert data["families"] == {"Scissors": 1, "Hook/Electrocautery": 1, "Suction": 0, "Other": 2}
    assert data["fallback"] == 1
    assert data["imbalance"] is None  # a family without clips
    assert data["cooccurrence"]["Hook/Electrocautery"] == {
        "Scissors": 0, "Hook/Electrocautery": 1, "Suction": 0, "Other": 1
    }
    assert data["cooccurrence"]["Other"]["Other"] == 3
    assert data["unmatched"] == [{"line": 3, "caption": "腹腔镜视野"}]
    assert data["sampling_weights"]["Suction"] == 0
    assert any("Suction" in warning for warning in data["warnings"])
    assert any("clips of Suction" in advice for advice in data["advice"])


def test_table_is_aligned_and_complete_in_a_pipe(clips: Path, label: Run, tmp_path: Path) -> None:
    output = label(clips, "-o", tmp_path / "l.jsonl")
    assert output.code == 0
    lines = output.out.splitlines()
    table = [line for line in lines if line.lstrip()[:1].isdigit() and "%" in line]
    assert [line.split()[1] for line in table] == ["Scissors", "Hook/Electrocautery", "Suction", "Other"]
    assert len({cell_len(line[: line.index("%")]) for line in table}) == 1  # a Chinese character is two columns wide
    assert "电凝钩/双极电凝" in output.out and "…" not in "".join(table)
    assert "line 3: 腹腔镜视野" in output.out
    assert "warning: Suction: no clip" in output.err and "warning" not in output.out


def test_strict_fails_and_leaves_nothing(clips: Path, label: Run, tmp_path: Path) -> None:
    ran = label(clips, "-o", tmp_path / "l.jsonl", "--strict")
    assert ran.code == 2 and "1 of 4 captions name no instrument (line 3)" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.jsonl"]


def test_dry_run_checks_every_line_and_writes_nothing(clips: Path, label: Run, tmp_path: Path) -> None:
    ran = label(clips, "-o", tmp_path / "l.jsonl", "--dry-run")
    assert ran.code == 0 and "4 clips of " in " ".join(ran.err.split()) and "taxonomy = " in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.jsonl"]
    clips.write_text(clips.read_text(encoding="utf-8") + "{", encoding="utf-8")
    ran = label(clips, "-o", tmp_path / "l.jsonl", "--dry-run")
    assert ran.code == 0 and "dropped     clips.jsonl, line 5: broken JSON" in ran.err


def test_written_settings_reproduce_the_run(clips: Path, label: Run, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    assert label("clips.jsonl", "-o", "l.jsonl", "--hard-labels").code == 0
    first = (tmp_path / "l.jsonl").read_bytes()
    monkeypatch.chdir("/")
    assert label("--config", tmp_path / "l.settings.toml", "--overwrite").code == 0
    assert (tmp_path / "l.jsonl").read_bytes() == first


@pytest.mark.parametrize(("arguments", "said"), [
    (["clips.jsonl"], "'output' is required"),
    (["-o", "l.jsonl"], "'clips' is required"),
    (["none.jsonl", "-o", "l.jsonl"], "cannot read none.jsonl"),
    (["clips.jsonl", "-o", "clips.jsonl", "--overwrite"], "labelling in place is refused"),
    (["clips.jsonl", "-o", "./sub/../clips.jsonl", "--overwrite"], "labelling in place is refused"),
    (["clips.jsonl", "-o", "l.jsonl", "--report", "clips.jsonl", "--overwrite"], "report clips.jsonl is the input"),
    (["clips.jsonl", "-o", "l.jsonl", "--report", "l.jsonl"], "report l.jsonl is the output"),
    (["clips.jsonl", "-o", "old.jsonl"], "output exists: old.jsonl"),
    (["clips.jsonl", "-o", "l.jsonl", "--report", "old.jsonl"], "output exists: old.jsonl"),
    (["clips.jsonl", "-o", "l.jsonl", "--taxonomy", "surgical5"], "'surgical5' (did you mean 'surgical4'?)"),
    (["clips.jsonl", "-o", "l.jsonl", "--taxonomy", "mine.toml"], "no such taxonomy file"),
    (["clips.jsonl", "-o", "l.jsonl", "--set", "taxonmy=cholec6"], "unknown key 'taxonmy' (did you mean 'taxonomy'?)"),
    (["broken.jsonl", "-o", "l.jsonl"], "none of its 2 clips can be labelled; broken.jsonl, line 1: broken JSON"),
    (["empty-caption.jsonl", "-o", "l.jsonl"], "empty-caption.jsonl, line 1: empty caption of x.mp4"),
])
def test_mistakes_are_one_line_and_exit_code_2(clips: Path, label: Run, tmp_path: Path, arguments: list[str],
                                               said: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "old.jsonl").write_text("kept")
    (tmp_path / "broken.jsonl").write_text('{"caption": "hook\n{"caption": \n')
    (tmp_path / "empty-caption.jsonl").write_text('{"video_path": "x.mp4", "caption": ""}\n')
    before = clips.read_bytes()
    ran = label(*arguments)
    assert ran.code == 2
    [error] = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert said in error
    assert clips.read_bytes() == before and (tmp_path / "old.jsonl").read_text() == "kept"
    assert not (tmp_path / "l.jsonl").exists() and not list(tmp_path.glob(".lapwan-tmp-*"))


def test_a_linked_input_is_not_overwritten(clips: Path, label: Run, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(clips)
    assert label(clips, "-o", link, "--overwrite").code == 2
    hard = tmp_path / "hard.jsonl"
    hard.hardlink_to(clips)
    assert label(clips, "-o", hard, "--overwrite").code == 2


def test_an_empty_file_says_so(label: Run, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    ran = label(tmp_path / "none.jsonl", "-o", tmp_path / "l.jsonl")
    assert ran.code == 2 and "has no clips" in ran.err
    assert not (tmp_path / "l.jsonl").exists()


def test_as_a_program_it_needs_no_torch_and_is_quiet(clips: Path, tmp_path: Path) -> None:
    code = ("import sys; from lapwan.cli import main\n"
            "try: main()\n"
            "except SystemExit as stop: assert not stop.code\n"
            "assert 'jieba' in sys.modules and 'torch' not in sys.modules and 'numpy' not in sys.modules")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, "label", clips, "-o", tmp_path / "l.jsonl", "-q"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
    help_ = subprocess.run([sys.executable, "-c", code.replace("'jieba' in", "'jieba' not in"), "label", "--help"],
                           capture_output=True, text=True, check=False)
    assert help_.returncode == 0, help_.stderr
    assert "--soft-labels" in help_.stdout and "--hard-labels" in help_.stdout


_MILLION = """
import json, resource, sys
from pathlib import Path
folder, clips = Path(sys.argv[1]), int(sys.argv[2])
with (folder / "clips.jsonl").open("w", encoding="utf-8") as file:
    for i in range(clips):
        caption = f"抓钳牵拉胆囊{i}，电凝钩分离，未使用剪刀" if i % 3 else f"术野{i}"
        file.write(json.dumps({"video_path": f"clips/{i:07d}.mp4", "caption": caption}, ensure_ascii=False) + "\\n")
from lapwan.cli import main
sys.argv = ["lapwan", "label", str(folder / "clips.jsonl"), "-o", str(folder / "labels.jsonl"), "-q"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_million_lines_stream_in_bounded_memory(tmp_path: Path) -> None:
    peaks = {}
    for clips in (1_000, 1_000_000):
        folder = tmp_path / str(clips)
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", _MILLION, folder, str(clips)],
                              capture_output=True, text=True, check=True)
        peaks[clips] = int(done.stdout.split("peak_kib")[1])
        with (folder / "labels.jsonl").open("rb") as file:
            assert sum(1 for _ in file) == clips
    # the captions alone are 60 MB; nothing that grows with them may stay
    assert peaks[1_000_000] - peaks[1_000] < 24 * 1024


def test_a_bad_line_does_not_keep_the_others_from_being_labelled(clips: Path, label: Run, tmp_path: Path) -> None:
    clips.write_text(clips.read_text(encoding="utf-8") + '{"caption": \n{"caption": "\\ud83d hook"}\n',
                     encoding="utf-8")
    ran = label(clips, "-o", tmp_path / "l.jsonl")
    assert ran.code == 2 and "2 of the clips could not be labelled: clips.jsonl, line 5: broken JSON" in ran.err
    assert "dropped: clips.jsonl, line 6: the caption holds half a character" in ran.err
    assert len((tmp_path / "l.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert label(clips, "-o", tmp_path / "m.jsonl", "--skip-bad").code == 0
