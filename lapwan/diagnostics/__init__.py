"""Numbers about weights and runs: `lora_figures` of a LoRA, `mixture` of a mixture, `routing` of a router in training,
`verdict` with the rules that judge them. `inspect` puts them together for `lapwan inspect-weights`."""
