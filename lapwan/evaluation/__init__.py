"""Adapters compared at equal noise: `study` runs the arms, `videos` and `metrics` score generations, `flow_losses`
measures losses, `router_accuracy` routers; `bootstrap` gives the intervals."""
