"""Datasets: clips.jsonl (`clips.py`), dataset.toml (`musubi_dataset.py`), decoding (`video.py`), `buckets.py`,
`frame_extraction.py`, masks and boxes (`regions.py`), reasons for dropping a clip (`dropped_clips.py`).
Captions to labels: `caption_text.py`, `negation.py`, `taxonomy.py`, `labels.py`."""
