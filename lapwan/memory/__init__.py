"""One memory plan from shapes, free device memory and free host memory, and what carries it out.

`plan` chooses the fastest strategy that fits; its candidates for train-lora and train-moe are in `training`, for
generate in `generation`; `srpo` plans alignment; `what_fits` plans for the released model without its weights.
Predicted sizes: `cost` (weights, activations, flops); `trace` runs the forward of a `shape_model` on meta tensors, and
`step` puts a training step together from it; `throughput` measures the device. `offload` moves idle noise experts to
host memory, `streaming` streams blocks from there; `out_of_memory` writes the error and the measured peaks.
"""
