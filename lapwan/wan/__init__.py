"""Wan's parts: a noise expert's velocity (`backbone`), prompts (`text`), latents (`vae`), the I2V condition.

The transformer's forward is in `transformer`, quantised weights in `quantise`.
"""
