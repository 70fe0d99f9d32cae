"""Numbers about weights and runs:
`lora_figures` of a LoRA, `mixture` of a mixture, `router_health` of a router in training with the advice,
`verdict` with the rules that judge them. `inspect` puts them together for `lapwan inspect-weights`.
`doctor` examines the machine."""
