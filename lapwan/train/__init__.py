"""Training. Open `trainer` for the loop and a step, `objective` for what an algorithm must implement, `recipe` for how
settings become a trainer, `training_data` for what a step trains on, `dropped_steps` for steps without an update,
`parallel` for several processes. `lora`, `moe` and `srpo` each hold one algorithm, `callbacks` what runs beside it."""
