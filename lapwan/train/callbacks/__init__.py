"""What runs beside the optimizer steps. `base` defines the hooks of a callback and says how to add one; `build` makes
those of a run: max norm, alpha phases, figures of the weights, validation, previews."""
