"""A CLIP checkpoint in open_clip's key layout into transformers' CLIPModel: HPS v2.1 is a ViT-H-14 of this kind.

The two name the same tensors differently. open_clip also keeps q, k and v in one matrix and applies its projections as
x·P, where a Linear stores Pᵀ. Activations are GELU, positions are learned, the text embedding is that of the end token.
Source: the published keys of open_clip's checkpoints and of transformers' CLIPModel; Radford et al. (arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.models.original_layout import read_tensors, set_parameters
from lapwan.rewards.clip import AnyClip, ClipFolder

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

HPS_FILE = "HPS_v2.1_compressed.pt"


@dataclass(frozen=True)
class Tower:
    """A transformer of `layers` blocks; the number of heads cannot be read from the weights."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Architecture:
    """Both towers, `embed` dimensions of the shared space, `patch` and `image` in pixels, `context` in tokens."""

    vision: Tower
    text: Tower
    embed: int
    patch: int
    image: int
    context: int = 77
    vocabulary: int = 49408

    def config(self) -> CLIPConfig:
        """The transformers configuration; the MLPs are four times as wide as the tower."""
        from transformers import CLIPConfig

        def tower_config(tower: Tower) -> dict[str, object]:
            return {"hidden_size": tower.width, "intermediate_size": 4 * tower.width,
                    "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads, "hidden_act": "gelu",
                    "layer_norm_eps": 1e-5, "projection_dim": self.embed}

        text = {**tower_config(self.text), "vocab_size": self.vocabulary, "max_position_embeddings": self.context,
                "bos_token_id": self.vocabulary - 2, "eos_token_id": self.vocabulary - 1}
        vision = {**tower_config(self.vision), "patch_size": self.patch, "image_size": self.image}
        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=self.embed)


VIT_H_14 = Architecture(Tower(1280, 32, 16), Tower(1024, 24, 16), embed=1024, patch=14, image=224)

_OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_INNER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
          "mlp.c_proj": "mlp.fc2"}


def to_transformers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in CLIPModel's layout; a name that is not open_clip's is passed through."""
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        tower, blocks, inner = name.partition("transformer.resblocks.")
        if name in _OUTER:
            yield _OUTER[name], value.T.contiguous() if name in _TRANSPOSED else value
        elif path in _OUTER:
            yield f"{_OUTER[path]}.{leaf}", value
        elif blocks and tower in ("", "visual."):
            number, _, inner = inner.partition(".")
            block = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            yield from _of_block(block, inner, value)
        else:
            yield name, value


def _of_block(block: str, inner: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    path, _, leaf = inner.rpartition(".")
    if path in _INNER:
        yield f"{block}.{_INNER[path]}.{leaf}", value
    elif inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = inner.removeprefix("attn.in_proj_")
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            yield f"{block}.self_attn.{letter}_proj.{leaf}", part.clone()
    else:
        yield f"{block}.{inner}", value


class HpsFile(ClipFolder):
    """HPS v2.1 in its file of open_clip's layout; it is published as the plain cosine."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__(HPS_FILE)

    def config(self, settings: AnyClip) -> CLIPConfig:
        return VIT_H_14.config()

    def load(self, settings: AnyClip, dtype: torch.dtype) -> CLIPModel:
        return load_checkpoint(settings.path, dtype)

    def check(self, settings: AnyClip) -> None:
        read_checkpoint(settings.path)
        super().check(settings)


def read_checkpoint(path: Path, architecture: Architecture = VIT_H_14) -> dict[str, Tensor]:
    """The tensors of an HPS v2.1 file, memory-mapped, in open_clip's layout; checks that they are that.

    Raises:
        UserError: no such file, unreadable, or not an open_clip checkpoint of this architecture.
    """
    if path.is_dir():
        path = path / HPS_FILE
    if not path.is_file():
        raise UserError(f"no such file: {path}; rewards are never downloaded: hf download xswu/HPSv2 {HPS_FILE} "
                        "--local-dir FOLDER")
    tensors = read_tensors(path)
    convolution, text = tensors.get("visual.conv1.weight"), tensors.get("text_projection")
    if convolution is None or text is None or convolution.dim() != 4:
        raise UserError(f"{path} is not HPS v2.1: it has no 'visual.conv1.weight' and 'text_projection' "
                        f"(open_clip's ViT-H-14); give {HPS_FILE} of xswu/HPSv2")
    width, _, patch, _ = convolution.shape
    expected = architecture.vision
    if (width, patch) != (expected.width, architecture.patch):
        raise UserError(f"{path} holds a CLIP of vision width {width} and patch {patch}, HPS v2.1 has {expected.width} "
                        f"and {architecture.patch} (ViT-H-14); give {HPS_FILE} of xswu/HPSv2")
    return tensors


def load_checkpoint(path: Path, dtype: torch.dtype, architecture: Architecture = VIT_H_14) -> CLIPModel:
    """A frozen CLIPModel in eval mode; the file's tensors must be exactly the model's.

    Raises:
        UserError: as `read_checkpoint`, or a tensor that is unexpected, missing or of another shape.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPModel

    tensors = read_checkpoint(path, architecture)
    with init_empty_weights():  # buffers (positions) are real
        model = CLIPModel(architecture.config())
    converted = ((name, value.to(dtype)) for name, value in to_transformers(tensors))
    set_parameters(model, converted, "an open_clip ViT-H-14 (HPS v2.1)", path)
    return model.eval().requires_grad_(False)
