"""Generation: from a request to a video file.

Start with `generator` (requests in batches; one video is a batch of one) and `denoise` (the loop and guidance).
`request` checks the options of a video, `start_image` its first frames. `scheduler` holds the sigma grid and the
samplers (UniPC, Euler, DPM++), `noise_experts` loads and offloads transformers, `adapters` reads LoRAs and mixtures,
`expert_mix` decides which experts act, `jobs` lists the videos of a command, `video` writes containers. `result` saves
a video with its settings and `facts` (fingerprints, gates, versions), and repeats it.
"""
