"""Stage 2, a mixture of LoRA experts with a router: `objective` has the loss, `recipe` goes from settings to a run."""
