"""Adapters compared at equal noise: `study` runs the arms, `videos` and `metrics` score generations, `flow` measures
losses, `routing` routers; `bootstrap` gives the intervals."""
