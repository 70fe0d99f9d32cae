"""Datasets: clips.jsonl (`clips.py`), dataset.toml (`musubi_dataset.py`), `buckets.py`, `frame_extraction.py`, reasons
for dropping a clip (`dropped_clips.py`). Decoding: `video.py` (facts and frames), with `decoding/`; `recordings.py`
(long ones). Regions: `regions.py`, as annotation tools write them `annotations.py`.
Captions to labels: `caption_text.py`, `negation.py`, `taxonomy.py`, `labels.py`."""
