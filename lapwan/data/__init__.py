"""Datasets: lists of clips (`clip_file.py`, `clip_tables.py`), their files (`clips.py`), dataset.toml
(`musubi_dataset.py`), text of any encoding (`text_encoding.py`), `buckets.py`, `frame_extraction.py`, `duplicates.py`,
why a clip is dropped (`dropped_clips.py`). Decoding: `video.py` (facts and frames), with `decoding/`; `recordings.py`
(long ones). Regions: `regions.py`, as annotation tools write them `annotations.py`.
Captions to labels: `caption_text.py`, `negation.py`, `mention_roles.py` with their words, `taxonomy.py`, `labels.py`,
`label_report.py`, `taxonomy_check.py`."""
