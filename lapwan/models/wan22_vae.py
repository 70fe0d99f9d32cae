"""Wan2.2's VAE (TI2V-5B: 48 channels, 4x16x16) in the original layout, `Wan2.2_VAE.pth`: its names and its config.

Source: the module structure of the official Wan2.2 release (vae2_2), that of diffusers' AutoencoderKLWan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_INNER = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_OUTER = {
    "conv1": "quant_conv", "conv2": "post_quant_conv",
    **{f"{side}.{theirs}": f"{side}.{ours}" for side in ("encoder", "decoder")
       for theirs, ours in (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))},
}
# A stage is a sequence of residual blocks with its resampling, if any, as the last member.
_STAGE = re.compile(r"(?P<side>encoder|decoder)\.(?:down|up)samples\.(?P<i>\d+)\.(?:down|up)samples\.(?P<j>\d+)\.(.+)")
_MIDDLE_NAME = re.compile(r"(encoder|decoder)\.middle\.([012])\.(.+)")
_STAGES = 4  # widths base · (1, 2, 4, 4)

# Mean and standard deviation of the latents by channel, which the .pth does not hold.
_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
CHANNELS = len(_MEAN)


def tensor_to_diffusers(name: str) -> str:
    """`encoder.downsamples.1.downsamples.0.residual.2.weight` -> `encoder.down_blocks.1.resnets.0.conv1.weight`.

    A name that is not of the original layout stays as it is.
    """
    path, _, leaf = name.rpartition(".")
    if path in _OUTER:
        return f"{_OUTER[path]}.{leaf}"
    if match := _MIDDLE_NAME.fullmatch(path):
        return f"{match[1]}.mid_block.{_MIDDLE[match[2]]}.{_INNER.get(match[3], match[3])}.{leaf}"
    if match := _STAGE.fullmatch(path):
        down = match["side"] == "encoder"
        stage = f"{match['side']}.{'down' if down else 'up'}_blocks.{match['i']}"
        if match[4] in _INNER:
            return f"{stage}.resnets.{match['j']}.{_INNER[match[4]]}.{leaf}"
        return f"{stage}.{'down' if down else 'up'}sampler.{match[4]}.{leaf}"
    return name


def config(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """An AutoencoderKLWan's config from shapes, names in either layout; None if it is another VAE.

    Widths, blocks a stage and which stages halve the time are read; 2x2 pixel patches are what its 12 channels mean.
    """
    shapes = {tensor_to_diffusers(name): tuple(value.shape) for name, value in tensors.items()}
    first, last = shapes.get("encoder.conv_in.weight"), shapes.get("decoder.conv_out.weight")
    quant = shapes.get("post_quant_conv.weight")
    if first is None or last is None or quant is None or (first[1], quant[0]) != (12, CHANNELS):
        return None
    blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down_blocks.0.resnets.")}
    halved = [f"encoder.down_blocks.{i}.downsampler.time_conv.weight" in shapes for i in range(_STAGES - 1)]
    return {
        "_class_name": "AutoencoderKLWan", "base_dim": first[0], "decoder_base_dim": last[1], "z_dim": CHANNELS,
        "num_res_blocks": len(blocks), "temperal_downsample": halved, "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
        "latents_mean": list(_MEAN), "latents_std": list(_STD),
    }
