"""Which files are videos and images, by suffix. How to add one: its suffix here, if PyAV or Pillow reads it."""

from __future__ import annotations

# `.avif` needs Pillow 11.3 or later; an older one says so file by file.
IMAGE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".avif", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".tga",
})
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".ts", ".gif", ".mts", ".m2ts",
    ".m2t", ".m2v", ".mpv", ".mpe", ".vob", ".evo", ".3gp", ".3g2", ".ogv", ".ogm", ".mxf", ".asf", ".f4v", ".divx",
    ".dv", ".mj2", ".mjpeg", ".mjpg", ".nut", ".y4m", ".qt", ".rm", ".rmvb", ".mod", ".tod", ".trp", ".tp", ".wtv",
    ".h264", ".264", ".avc", ".h265", ".265", ".hevc", ".ivf", ".obu", ".mk3d", ".dav", ".amv", ".m1v", ".apng",
})
