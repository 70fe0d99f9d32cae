"""Wan's transformer over diffusers' modules: `forward.predict` is the whole of it, `block.block_forward` one block.

How it runs (compiled, checkpointed, offloaded, context parallel) is set by the `ForwardOptions` of its `WanBackbone`.
"""
