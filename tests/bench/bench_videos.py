"""Videos as recorders, phones and editors make them: what lapwan reads, compared with ffmpeg frame by frame.

usage: python tests/bench/bench_videos.py OUT [--folder FOLDER]   (needs ffmpeg and ffprobe; about a minute)

Each frame carries its number as a row of ten black and white bars and a colour in each corner, so that the frame on
display at any time and the colours of any two readers can be compared whatever the codec did. `--folder` compares
files that are there already, made with the same pattern. The table of a run is kept as videos_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

import numpy as np
from wild_videos import make_videos

from lapwan.data.buckets import centre_crop
from lapwan.data.decoding.pixels import ReadOptions
from lapwan.data.dropped_clips import BadClip
from lapwan.data.video import probe, read_frames

RATE = 16.0
LATE = 0.0011  # seconds that a container may round a time by
CORNERS = ((200, 40, 40), (40, 180, 60), (50, 60, 200), (200, 190, 60))
FULL = "accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"


def pattern(number: int, width: int = 320, height: int = 240, bits: int = 10) -> np.ndarray:
    """uint8 [H, W, 3]: coloured corners and the number in bars across the middle."""
    pixels = np.full((height, width, 3), 120, np.uint8)
    across, down = width // 6, height // 4
    for colour, rows, columns in zip(CORNERS, (slice(0, down), slice(0, down), slice(-down, None), slice(-down, None)),
                                     (slice(0, across), slice(-across, None)) * 2, strict=True):
        pixels[rows, columns] = colour
    bar = width * 8 // 10 // bits
    left = (width - bar * bits) // 2
    for bit in range(bits):
        level = 235 if number >> (bits - 1 - bit) & 1 else 16
        pixels[height * 5 // 12 : height * 7 // 12, left + bit * bar : left + (bit + 1) * bar] = level
    return pixels


def number_of(pixels: np.ndarray, bits: int = 10) -> int:
    """The number that `pattern` drew, read in an upright frame, or in one turned by 90 degrees, in both directions."""
    grey = pixels.astype(np.float32).mean(axis=-1)
    height, width = grey.shape
    bar = width * 8 / 10 / bits
    left = (width - bar * bits) / 2
    value = 0
    for bit in range(bits):
        x = int(left + (bit + 0.5) * bar)
        value = value << 1 | int(grey[height // 2 - 2 : height // 2 + 3, max(0, x - 1) : x + 2].mean() > 125)
    return value


def corner_colours(pixels: np.ndarray) -> np.ndarray:
    """Mean colours [4, 3] near the corners: top left, top right, bottom left, bottom right."""
    height, width = pixels.shape[:2]
    down, across = height // 10, width // 14
    spots = [(y, x) for y in (down, height - down) for x in (across, width - across)]
    return np.array([pixels[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(axis=0) for y, x in spots])


def reference(path: Path, fields: bool) -> tuple[np.ndarray, list[float]]:
    """ffmpeg's frames [N, H, W, 3], turned upright, square pixels, deinterlaced if `fields`, and their times."""
    chain = ["yadif"] if fields else []
    chain += ["scale=w=trunc(iw*max(sar\\,1)+0.5):h=trunc(ih/min(sar\\,1)+0.5):flags=" + FULL + ":out_range=pc",
              "format=rgba", "showinfo"]
    source = ["-framerate", str(RATE), "-i", str(path / "f%d.png")] if path.is_dir() else ["-i", str(path)]
    command = ["ffmpeg", "-hide_banner", "-nostdin", "-threads", "1", *source, "-map", "0:V:0", "-vsync",
               "passthrough", "-copyts", "-vf", ",".join(chain), "-f", "rawvideo", "-"]
    ran = subprocess.run(command, capture_output=True, check=False)
    log = ran.stderr.decode(errors="replace")
    times = [float(match.replace("NOPTS", "nan")) for match in re.findall(r"pts_time:\s*(\S+)", log)]
    sizes = re.findall(r"showinfo.* s:(\d+)x(\d+)", log)
    if not sizes or not ran.stdout:
        raise BadClip("ffmpeg decodes no frame")
    width, height = map(int, sizes[0])
    frames = np.frombuffer(ran.stdout, np.uint8)
    frames = frames[: len(frames) // (width * height * 4) * width * height * 4].reshape(-1, height, width, 4)
    if int(frames[..., 3].min()) < 255:
        frames = (frames[..., :3].astype(np.uint16) * frames[..., 3:] // 255).astype(np.uint8)  # over black
    frames = frames[..., :3]
    return frames, filled(times[: len(frames)])


def filled(times: list[float]) -> list[float]:
    """Times with those that are missing or jump back counted on, at the usual gap, from the frame before."""
    known = [time for time in times if not np.isnan(time)]
    step = float(np.median(np.diff(known))) if len(known) > 1 else 0.0
    leading = int(np.isnan(times).argmin()) if known else 0
    out = [known[0] - (leading - i) * step for i in range(leading)]
    offset = 0.0
    for time in times[leading:]:
        if out and (np.isnan(time) or time + offset < out[-1] or time + offset > out[-1] + 10):
            offset = offset if np.isnan(time) else out[-1] + step - time
            time = out[-1] + step - offset
        out.append(time + offset)
    return out


def is_interlaced(path: Path) -> bool:
    """Whether ffprobe calls the stream or its first frame interlaced."""
    out = subprocess.run(["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries",
                          "stream=field_order:frame=interlaced_frame", "-read_intervals", "%+#1", "-of", "json",
                          str(path)], capture_output=True, check=False).stdout
    data = json.loads(out or b"{}")
    order = [stream.get("field_order") for stream in data.get("streams", [])]
    return any(o in ("tt", "bb", "tb", "bt") for o in order) or any(
        frame.get("interlaced_frame") for frame in data.get("frames", []))


def row(path: Path, options: ReadOptions) -> tuple[str, str, str, str]:
    """(verdict, frames compared, largest difference of corner colours and mean over all pixels, remark) for a file."""
    try:
        frames, times = reference(path, is_interlaced(path))
    except BadClip:
        frames, times = np.empty((0, 1, 1, 3), np.uint8), []
    try:
        facts = probe(path, RATE, options=options)
        count = facts.count_at(RATE)
        crop = centre_crop(facts.width, facts.height, (facts.width, facts.height))
        read = read_frames(path, range(count), crop, RATE, facts)
        late = {start: read_frames(path, range(start, min(start + 5, count)), crop, RATE, facts)
                for start in range(36, count, 7)}
    except BadClip as error:
        return "named", f"0 of {len(frames)}", "", str(error)
    if not len(frames):
        numbers = [number_of(pixels) for pixels in read]
        follow = numbers == [int(k * facts.fps / RATE + 1e-6) for k in range(count)]
        return "read" if follow else "DIFFERS", f"{count}", "", f"ffmpeg reads nothing; {facts.frames} frames"
    if (sized := (facts.width, facts.height)) != frames.shape[2:0:-1]:
        return "DIFFERS", f"{count}", "", f"size {sized}, ffmpeg {frames.shape[2:0:-1]}"
    slack = min(0.1 / facts.fps, LATE) if facts.fps else 0
    expected = [max(i for i, time in enumerate(times) if time - times[0] <= k / RATE + slack) for k in range(count)]
    remark = []
    wrong = [k for k, i in enumerate(expected) if number_of(read[k]) != number_of(frames[i])]
    if wrong:
        remark.append(f"{len(wrong)} frames differ, first {wrong[0]}: {number_of(read[wrong[0]])}, ffmpeg "
                      f"{number_of(frames[expected[wrong[0]]])}")
    sought = [start for start, part in late.items() if not np.array_equal(part, read[start : start + 5])]
    if sought:
        remark.append(f"windows at {sought} differ when sought")
    colour = max(float(np.abs(corner_colours(read[k]) - corner_colours(frames[i])).max())
                 for k, i in enumerate(expected))
    mean = max(float(np.abs(read[k].astype(int) - frames[i]).mean()) for k, i in enumerate(expected))
    total = times[-1] - times[0] + float(np.median(np.diff(times))) if len(times) > 1 else 1 / (facts.fps or 1)
    if abs(facts.seconds - total) > 1.5 / (facts.fps or 1) and not facts.is_image:
        remark.append(f"{facts.seconds:.2f} s, ffmpeg {total:.2f} s")
    bad = bool(remark) or ((colour > 3 or mean > 3) and "tone-mapped" not in facts.treatment)
    remark += [facts.treatment] if facts.treatment else []
    return "DIFFERS" if bad else "equal", f"{count}", f"{colour:.1f} / {mean:.1f}", "; ".join(remark)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--hdr", choices=("refuse", "tonemap"), default="refuse")
    given = parser.parse_args()
    if given.folder is None:
        make_videos(given.out, pattern)
    print("| file | result | frames at 16 fps | colour: corners / mean, levels | remark |\n|---|---|---|---|---|")
    for path in sorted((given.folder or given.out).iterdir()):
        print(f"| {path.name} | " + " | ".join(row(path, ReadOptions(hdr=given.hdr))) + " |", flush=True)


if __name__ == "__main__":
    main()
