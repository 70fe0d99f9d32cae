"""Training. Open `trainer` for the loop and a step, `objective` for what an algorithm must implement, `recipe` for how
settings become a trainer. `lora`, `moe` and `srpo` each hold one algorithm, `callbacks` what runs beside it."""
