"""What runs beside the optimizer steps. `base` defines the two kinds of callback and says how to add one; `build` makes
those of a run: previews, validation, figures of the weights."""
