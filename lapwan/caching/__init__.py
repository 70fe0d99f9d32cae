"""Latents and text features on disk: what to encode (`plan.py`), what makes a file stale (`stale.py`), encoding
(`decoder.py`, `encode.py`), the run as a whole (`cache_folder.py`), file formats (`layout.py`, `index.py`), reading
(`read.py`), batches for training (`collate.py`)."""
