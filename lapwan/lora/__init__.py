"""LoRA and its relatives: the stacked layer (`layer`), attaching it (`attach`), an adapter in memory (`state`) and the
kinds of update it holds (`kinds`, `lycoris`), files (`formats`, `metadata`, `checks`, `read_back`), the noise expert a
file is for (`noise_expert`), which of several files goes where (`assign`), LoRA + LoRA (`combine`, `average`), ranks
(`svd`, `extract`), adapters into weights (`merge`), which modules get one (`targets`)."""
