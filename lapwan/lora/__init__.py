"""LoRA: the stacked layer (`layer`), attaching it (`attach`), files (`formats`, `metadata`), which file goes to which
noise expert (`assign`), LoRA + LoRA (`combine`), LoRA into weights (`merge`), which modules get one (`targets`)."""
