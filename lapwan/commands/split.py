"""`lapwan split`: hours of video to a clips.jsonl of windows, by start and duration; nothing is re-encoded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lapwan import console
from lapwan.console import PlanRow, count_text, duration_text
from lapwan.data.clip_file import to_line
from lapwan.data.decoding.frame_files import natural_key
from lapwan.data.dropped_clips import BadClip, DroppedClip, dropped_lines
from lapwan.data.recordings import SplitResult, SplitRule, split_recording
from lapwan.data.suffixes import VIDEO_SUFFIXES
from lapwan.data.text_encoding import UnreadableText, decode
from lapwan.data.video import VideoFacts, probe
from lapwan.documents import read_bytes
from lapwan.errors import UserError
from lapwan.files import claim_output, write_text
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.split import SplitSettings

_RATE = 16.0  # of no effect on videos, which have a rate of their own


def run(settings: SplitSettings, options: RunOptions) -> None:
    """Probe all recordings, then sample each and write its windows.

    Raises:
        UserError: the output exists, no recording can be read, a caption that is no text, or no window is kept; after
            the others are written, that some recordings could not be read.
    """
    claim_output(settings.output, options.overwrite)
    files, drops = _recordings(settings.recordings), []
    usable: list[tuple[Path, VideoFacts]] = []
    captions: dict[Path, str] = {}
    for path in files:
        try:
            usable.append((path, probe(path, _RATE)))
            captions[path] = settings.caption or _caption_beside(path)
        except BadClip as error:
            drops.append(DroppedClip(str(path), str(error)))
    if not usable:
        raise UserError("no recording can be read: " + "; ".join(f"{drop.name}: {drop.reason}" for drop in drops[:3]))
    if options.dry_run:
        _plan(settings, usable, drops)
        return
    rule = SplitRule(settings.seconds, settings.stride or settings.seconds, settings.every, settings.scenes,
                     settings.keep_black, settings.keep_still)
    lines: list[str] = []
    with console.progress("sample", max(1, round(sum(facts.seconds for _, facts in usable))), "s") as bar:
        for path, facts in usable:
            reported = 0

            def advance(at: float, length: float = facts.seconds) -> None:
                nonlocal reported
                if (now := int(min(at, length))) > reported:
                    bar.advance(now - reported)
                    reported = now

            try:
                result = split_recording(path, facts, rule, advance)
            except BadClip as error:
                drops.append(DroppedClip(str(path), str(error)))
                continue
            lines += [to_line(line) for line in _lines(settings, path, captions[path], result)]
            console.log(_summary(path, facts, result, settings.scenes))
    for text in dropped_lines(drops):
        console.log(text.strip())
    if not lines:
        raise UserError("no window was kept: recordings shorter than --seconds, black or still throughout "
                        "(--keep-black, --keep-still)")
    write_text(settings.output, "".join(lines))
    if settings.caption is None and any('"caption": ""' in line for line in lines):
        console.warn(f"windows without a caption in {settings.output}: write them before lapwan cache, or pass "
                     "--caption")
    console.results.print(f"{settings.output}: {count_text(len(lines), 'window')} of "
                          f"{count_text(len(usable), 'recording')}", markup=False)
    if drops and not settings.skip_bad:
        first = f": {drops[0].name}: {drops[0].reason}" if len(drops) == 1 else ", listed above"
        raise UserError(f"{len(drops)} of the recordings could not be read{first}; all others are split; fix or remove "
                        "them, or pass --skip-bad")


def _recordings(given: tuple[Path, ...]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted((file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES),
                            key=lambda file: natural_key(file.name))
            if not inside:
                raise UserError(f"{path} holds no videos; sub-folders are not read, name them")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"no such file: {path}")
    return files


def _plan(settings: SplitSettings, usable: list[tuple[Path, VideoFacts]], drops: list[DroppedClip]) -> None:
    seconds = sum(facts.seconds for _, facts in usable)
    between = settings.every or settings.stride or settings.seconds
    console.show_plan([
        settings_row(settings, "recordings"),
        PlanRow("recordings", f"{count_text(len(usable), 'recording')}, {duration_text(seconds)} in all"),
        PlanRow("windows", f"of {settings.seconds:g} s every {between:g} s"
                           + (", inside scenes" if settings.scenes else "")),
        PlanRow("output", str(settings.output)),
        *(PlanRow("dropped", f"{drop.name}: {drop.reason}") for drop in drops)])
    console.show_settings(to_toml(settings))


def _caption_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return ""
    try:
        text, _ = decode(read_bytes(beside))
    except UnreadableText:
        raise UserError(f"{beside} is no text in UTF-8, UTF-16, GB18030 or Windows-1252; save it as UTF-8, or pass "
                        "--caption") from None
    return text.strip()


def _lines(settings: SplitSettings, path: Path, caption: str, result: SplitResult) -> list[dict[str, Any]]:
    # Beside the JSONL, where paths are looked for first; absolute across drives.
    try:
        named = Path(os.path.relpath(path.resolve(), settings.output.resolve().parent)).as_posix()
    except ValueError:
        named = str(path.resolve())
    return [{"video_path": named, "start": round(window.start, 3), "duration": window.seconds, "caption": caption,
             **({"scene": window.scene} if settings.scenes else {})} for window in result.windows]


def _summary(path: Path, facts: VideoFacts, result: SplitResult, scenes: bool) -> str:
    parts = [f"{path.name}: {duration_text(facts.seconds)}"]
    parts += [count_text(len(result.scenes), "scene")] if scenes else []
    parts.append(count_text(len(result.windows), "window"))
    parts += [f"{result.black} black"] if result.black else []
    parts += [f"{result.still} still"] if result.still else []
    return ", ".join(parts)
