"""LoRA: the stacked layer (`layer`), attaching it (`attach`), files (`formats`, `metadata`), the noise expert a file is
for (`noise_expert`), which of several files goes where (`assign`), LoRA + LoRA (`combine`), LoRA into weights
(`merge`), which modules get one (`targets`)."""
