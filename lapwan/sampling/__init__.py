"""Generation: from a request to a video file.

Start with `generator` (one video, step by step) and `denoise` (the loop and guidance). `scheduler` holds the sigma grid
and the samplers (UniPC, Euler, DPM++), `noise_experts` loads and offloads transformers, `adapters` reads LoRAs and
mixtures, `expert_mix` says which experts act, `jobs` lists the videos of a command, `video` writes containers, `result`
saves a video with its settings and repeats it.
"""
