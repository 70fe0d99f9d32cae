"""Change the alpha of what is being trained without changing what it does.

    ΔW = (α/r)·B A is kept when α becomes α' by B' = B·α/α'.  The gradient of B' is α'/α times that of B.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lapwan.lora.attach import Adapter


@torch.no_grad()
def set_alpha(adapter: Adapter, alpha: float) -> None:
    """Give every trained group this alpha; B stays, so ΔW changes in proportion."""
    for layer in adapter.layers.values():
        layer.groups = [replace(g, alpha=alpha) if g.trainable else g for g in layer.groups]
        scale = torch.tensor([g.alpha / g.down_RI.shape[0] for g in layer.groups], dtype=torch.float64)
        ranks = torch.tensor([g.down_RI.shape[0] for g in layer.groups])
        layer.scale_R.copy_(scale.repeat_interleave(ranks))
