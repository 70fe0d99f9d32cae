"""What `video.py` reads with: `frame_stream.py`, `timeline.py` (seeking, times), `pixels.py`, `images.py`, `hdr.py`
(colours, orientation), `frame_files.py` (folders of frames)."""
