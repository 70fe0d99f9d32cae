"""Stage 1, a plain LoRA on each noise expert: `objective` has the loss and the files, `recipe` goes from settings to a
run."""
