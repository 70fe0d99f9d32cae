"""Reading clips.jsonl: what stays, what is refused and with which line, and which file a path means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lapwan.data.clip_file import read_clips, to_line
from lapwan.data.clips import resolve_video
from lapwan.errors import UserError


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "clips.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_fields_and_order_stay(tmp_path: Path) -> None:
    line = '{"z": [1, 2.5, null, true], "video_path": "a.mp4", "caption": "抓钳", "a": {"y": 1, "b": "é"}, "n": 10}'
    [clip] = read_clips(write(tmp_path, line))
    assert clip.line == 1 and clip.caption == "抓钳"
    assert to_line(clip.data) == line + "\n"


def test_blank_lines_and_a_byte_order_mark_are_no_clips(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + '{"caption": "剪刀"}'.encode(), "", "  ", '{"caption": "钩"}', "")
    clips = read_clips(path)
    assert [(clip.line, clip.caption) for clip in clips] == [(1, "剪刀"), (4, "钩")]
    assert clips.bytes_read == clips.bytes_total == path.stat().st_size


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    [clip] = read_clips(write(tmp_path, r'{"caption": "hook", "x": "\ud83d"}'))
    assert json.loads(to_line(clip.data).encode("utf-8")) == clip.data


@pytest.mark.parametrize(("line", "said"), [
    ('{"caption": "a"', "broken JSON"),
    ("{'caption': 'a'}", "broken JSON"),
    ("caption: a", "broken JSON"),
    ('{"caption": "a"} {"caption": "b"}', "broken JSON"),
    ('{"caption": "a", "x": NaN}', "NaN is not JSON"),
    ('{"caption": "a", "x": 1e999}', "1e999 is too large"),
    ("[" * 100_000, "nested too deep"),
    ("[1]", "expected a JSON object, found a list"),
    ('"text"', "expected a JSON object, found text"),
    ("3", "expected a JSON object, found a number"),
    ('{"video_path": "a.mp4"}', "no 'caption'; found: video_path"),
    ('{"captions": "a"}', "no 'caption' (did you mean 'captions'?)"),
    ('{"caption": ""}', "empty caption"),
    ('{"caption": " \\n", "video_path": "a.mp4"}', "empty caption of a.mp4"),
    ('{"caption": null}', "'caption' must be text, found null"),
    ('{"caption": ["a"]}', "'caption' must be text, found a list"),
    (b'{"caption": "\x81 "}', "not UTF-8, GB18030 or"),
])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str | bytes, said: str) -> None:
    path = write(tmp_path, '{"caption": "good"}', "", line, '{"caption": "good"}')
    with pytest.raises(UserError) as error:
        list(read_clips(path))
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ") and said in message
    assert "\n" not in message and len(message) < len(str(path)) + 200


def test_a_json_array_is_recognised(tmp_path: Path) -> None:
    [clip] = read_clips(write(tmp_path, '[{"caption": "a"}]'))
    assert clip.caption == "a" and clip.location == "clips.jsonl, entry 1"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.jsonl: No such file"):
        read_clips(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no videos or images"):
        read_clips(tmp_path)


def test_video_paths_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, here = tmp_path / "data", tmp_path / "here"
    data.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    jsonl = data / "clips.jsonl"
    (data / "beside.mp4").touch()
    (here / "local.mp4").touch()
    assert resolve_video("beside.mp4", jsonl) == data / "beside.mp4"
    assert resolve_video("local.mp4", jsonl) == here / "local.mp4"
    assert resolve_video(str(here / "local.mp4"), jsonl) == here / "local.mp4"
    with pytest.raises(UserError, match=r"no such file: none.mp4; looked for .*data/none.mp4 and .*here/none.mp4"):
        resolve_video("none.mp4", jsonl)
    with pytest.raises(UserError, match=r"no such file: /nowhere/none.mp4"):
        resolve_video("/nowhere/none.mp4", jsonl)


def test_two_files_for_one_path_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, here = tmp_path / "data", tmp_path / "here"
    data.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (data / "a.mp4").touch()
    (here / "a.mp4").touch()
    with pytest.raises(UserError, match=r"ambiguous.*write the absolute path"):
        resolve_video("a.mp4", data / "clips.jsonl")
    # one and the same file under both is no ambiguity
    (here / "b.mp4").touch()
    os.link(here / "b.mp4", data / "b.mp4")
    assert resolve_video("b.mp4", data / "clips.jsonl") == data / "b.mp4"
    monkeypatch.chdir(data)
    assert resolve_video("a.mp4", Path("clips.jsonl")) == data / "a.mp4"
