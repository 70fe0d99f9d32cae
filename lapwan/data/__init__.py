"""Datasets: clips.jsonl (`clips.py`), dataset.toml (`musubi_dataset.py`), `buckets.py`, `frame_extraction.py`, reasons
for dropping a clip (`dropped_clips.py`). Decoding: `video.py` (facts and frames), `frame_stream.py` and `timeline.py`
(seeking and times), `pixels.py`, `images.py`, `hdr.py` (colours), `frame_files.py` (folders of frames), `recordings.py`
(long ones). Regions: `regions.py`, as annotation tools write them `annotations.py`.
Captions to labels: `caption_text.py`, `negation.py`, `taxonomy.py`, `labels.py`."""
