"""What the artefacts rest on: a Wan2.2 T2V model of random weights, a random CLIP model, and a handful of videos.

Written through diffusers and transformers alone, so that no change of lapwan changes them.
"""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import torch

CAPTIONS = (  # scissors, hook, suction, grasper; the second four are held out
    "剪刀剪断组织。", "电凝钩切割血管，左侧。", "吸引清理术野", "抓钳抓取标本袋",
    "scissors cut tissue from the left", "电凝钩切割组织。吸引止血。", "suction clears the field",
    "a grasper holds the bag",
)
TEST_CLIPS = (4, 5, 6, 7)
SIZE, FRAMES, FPS = (48, 32), 5, 8  # the model's own: height and width, frames, frames a second
CLIP_SIZE, CLIP_FRAMES = (64, 80), 18  # of the videos: height and width
_DEFAULTS = {"steps": 4, "guidance": {"high": 3.0, "low": 2.0}, "size": SIZE, "num_frames": FRAMES, "fps": FPS}


def write_base(folder: Path) -> None:
    """A model folder in diffusers layout, about 1 MB."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      is_encoder_decoder=False, use_cache=False)
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval(),
        transformer=_transformer(), transformer_2=_transformer(), boundary_ratio=0.875,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                          num_train_timesteps=1000, flow_shift=5.0),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "lapwan.json").write_text(json.dumps(_DEFAULTS, indent=2) + "\n", encoding="utf-8")


def _transformer() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=48, num_layers=3, rope_max_seq_len=64).eval()


def _tokenizer() -> object:
    """A Unigram vocabulary of bytes and the captions' characters; no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Tokenizer

    characters = sorted({c for caption in CAPTIONS for c in caption} - {" "})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    vocabulary += [("▁", -2.0)] + [(c, -3.0) for c in characters]
    raw = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5Tokenizer(tokenizer_object=raw, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                       model_max_length=512)


def write_clip_model(folder: Path) -> None:
    """A CLIPModel as a hub folder lies on disk, for a reward: about 0.2 MB."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    # CLIP writes bytes as printable characters: those that are printable, then others from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    end = len(pieces) - 1
    text = CLIPTextConfig(vocab_size=len(pieces), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=77, projection_dim=16, bos_token_id=end - 1,
                          eos_token_id=end, pad_token_id=end)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=4, projection_dim=16)
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    for parameter in model.parameters():  # transformers' own draw leaves all captions nearly alike
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def write_clips(folder: Path) -> None:
    """Videos of a bright box that moves, and clips.jsonl: boxes for every other clip, half of them held out."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, caption in enumerate(CAPTIONS):
        name = f"clip{index}.mp4"
        boxes = _write_video(folder / name, index)
        row: dict[str, object] = {"video_path": name, "caption": caption,
                                  "split": "test" if index in TEST_CLIPS else "train"}
        if index % 2 == 0:
            row["roi"] = [{"frame": i, "box": box} for i, box in enumerate(boxes)]
        rows.append(row)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "clips.jsonl").write_text(text, encoding="utf-8")


def _write_video(path: Path, seed: int) -> list[list[float]]:
    """Write it; gives the box of every frame as fractions of the width and height."""
    height, width = CLIP_SIZE
    rng = np.random.default_rng(seed)
    ground, colour = rng.integers(20, 120, 3), rng.integers(140, 255, 3)
    x, y, dx, dy = rng.integers(4, 30), rng.integers(4, 30), rng.integers(1, 3), rng.integers(0, 2)
    boxes = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20", "threads": "1"}
        for index in range(CLIP_FRAMES):
            left, top = int(x + index * dx), int(y + index * dy)
            pixels = np.empty((height, width, 3), np.uint8)
            pixels[:] = ground
            pixels[top:top + 16, left:left + 16] = colour
            corners = zip((left, top, left + 16, top + 16), (width, height, width, height), strict=True)
            boxes.append([at / whole for at, whole in corners])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return boxes
