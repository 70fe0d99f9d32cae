"""Preference alignment (SRPO): `objective` is the loss, `rollout` samples the clean latents, `data` reads prompts or
clips, `plan` checks a run before anything is loaded, `recipe` builds it from settings, `held_out` evaluates it."""
