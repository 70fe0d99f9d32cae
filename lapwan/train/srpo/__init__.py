"""Preference alignment (SRPO): `objective` is the loss, `rollout` samples the clean latents, `recipe` builds a run from
settings, `held_out` evaluates it."""
