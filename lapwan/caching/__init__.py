"""Latents and text features on disk: what to encode (`plan.py`; names `stems.py`, remarks `dataset_notes.py`), what
makes a file stale (`stale.py`), encoding (`decoder.py`, `encode.py`), the run as a whole (`cache_folder.py`,
`report.py`), file formats (`layout.py`, `index.py`, `musubi_cache.py`), checking (`verify.py`), reading (`read.py`,
labels `families.py`), batches for training (`collate.py`). Sheets: `dataset_preview.py` before encoding, `preview.py`
of what is cached."""
