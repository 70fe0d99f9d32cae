"""The mixture of LoRA experts (`mixture`): routers (`router`), timestep gate (`timestep_gate`), its file
(`mixture_file`), a mixture as a plain LoRA (`to_lora`). Its training is in `lapwan.train.moe`."""
