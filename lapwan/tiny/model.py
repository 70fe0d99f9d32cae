"""The embedded model: its folder, built on first use from the shipped weights, and its tokenizer.

The tokenizer's Unigram vocabulary for Chinese and English is written out, because a trained one is not reproducible
(ties are broken in hash order). It has the surgical words as whole pieces, the 3,755 common characters of GB 2312
level 1, ASCII, and bytes for everything else, so no text is unknown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapwan import files
from lapwan.files import cache_root
from lapwan.models.spec import DEFAULTS_FILE, Task
from lapwan.names import NoiseExpert

if TYPE_CHECKING:
    from transformers import T5Tokenizer


PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2: UMT5Config's pad and eos, T5Tokenizer's unk

# Whole pieces: the words of captions of laparoscopic clips. Their order fixes the ids of the shipped embedding: append
# only with newly trained weights.
_WORDS = (
    "剪刀 剪切 剪断 剪开 电凝钩 双极电凝 电凝 钩 吸引 吸引器 吸 吸出 清理 抓钳 戳卡 镊子 夹持 抓取 标本袋 "
    "切割 分离 牵拉 提起 血管 组织 术野 胆囊 粘连 韧带 积液 止血 左侧 右侧 上方 下方 手术 腹腔镜 使用 "
    "进行 器械 视野 血液 脂肪 胆囊管 烟雾 吸引管 吸净 夹住 抓住 切断 伸入 进入 推进 划动 移动 扫动 摆动 "
    "画圈 转圈 顺时针 逆时针 回拉 拉回 回撤 牵开 向左 向右 向上 向下 向前 向后 向外 先 再 并 从 反复 来回 "
    "积血 出血 胆汁 小血管 粘连带 工具 一件 灰色 训练箱 内 腔镜 组织剪刀 单极 无损伤 软组织 胆囊壁 提拉 "
    "L型 "
    "scissors hook electrocautery suction grasper bipolar cautery clipper irrigator trocar forceps cut cuts "
    "cutting snips dissects burns coagulates aspirates clears cleans grasps holds lifts pulls retracts the a an "
    "of with from left right top bottom above below side tissue vessel gallbladder adhesion ligament blood fluid "
    "bag specimen field and surgeon uses using instrument sweeps circles clockwise counterclockwise upward "
    "downward enters enter moves move tool tube tip first back forth forward backward outward inward repeatedly "
    "pulling to it they then draws removes removing clearing holding grasping dividing divide dissecting "
    "cauterizes cauterizing laparoscopic box trainer in Scissors Laparoscopic A An In They It The "
)


def _common_chinese_characters() -> list[str]:
    """GB 2312 level 1 (rows 16-55), the most used Chinese characters, from Python's own codec."""
    characters = []
    for row in range(16, 56):
        for column in range(1, 95):
            if row == 55 and column > 89:
                break  # the last five cells of row 55 are empty
            characters.append(bytes([row + 0xA0, column + 0xA0]).decode("gb2312"))
    return characters


def vocabulary() -> list[tuple[str, float]]:
    """(piece, log probability) in id order: specials, bytes, the space mark, words, characters."""
    pieces = [(PAD, 0.0), (EOS, 0.0), (UNK, 0.0)]
    pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    pieces.append(("▁", -2.0))
    for word in _WORDS.split():
        pieces.append((("▁" + word) if word.isascii() else word, -4.0))
    present = {piece for piece, _ in pieces}
    characters = [*(chr(code) for code in range(33, 127)), *"，。、；：！？「」（）", *_common_chinese_characters()]
    pieces += [(character, -8.0) for character in characters if character not in present]
    return pieces


def make_tokenizer() -> T5Tokenizer:
    """A T5Tokenizer over `vocabulary()` that appends EOS; extra_ids=0, else 100 sentinels exceed the embedding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Tokenizer

    raw = Tokenizer(models.Unigram(vocabulary(), unk_id=2, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    raw.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return T5Tokenizer(
        tokenizer_object=raw, extra_ids=0, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=512
    )


TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 48, "out_channels": 16, "text_dim": 96,
    "freq_dim": 64, "ffn_dim": 768, "num_layers": 8, "rope_max_seq_len": 256, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
}
# Few channels at high resolution, many at low: a clip encodes in under a second on a CPU core.
VAE: dict[str, Any] = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 8, 8], "num_res_blocks": 2}
TEXT = {
    "d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 3, "num_heads": 4, "is_encoder_decoder": False,
    "use_cache": False,
}
TEXT_FILE = "text_encoder.safetensors"
WEIGHTS = Path(str(package_files("lapwan.tiny"))) / "weights"


@dataclass(frozen=True)
class EmbeddedParts:
    """Shapes and shipped files of trained parts: a VAE with the statistics of its latents, and its noise experts."""

    vae: dict[str, Any]
    transformer: dict[str, Any]
    vae_file: str
    latents_file: str
    transformer_files: dict[NoiseExpert, str]

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return int(self.vae["z_dim"])

    @property
    def files(self) -> tuple[str, ...]:
        """All of them, and the text encoder's."""
        return (*self.transformer_files.values(), self.vae_file, TEXT_FILE, self.latents_file)


A14B = EmbeddedParts(VAE, TRANSFORMER, "vae.safetensors", "latents.json",
                     {e: f"{e.component}.safetensors" for e in NoiseExpert})


@dataclass(frozen=True)
class EmbeddedModel:
    """A folder made of parts; `in_channels` are the first of the shipped patch embedding's."""

    parts: EmbeddedParts
    pipeline: str
    in_channels: int
    guidance: float
    boundary: float
    size: int = 96  # pixels
    fps: int = 16
    flow_shift: float = 5.0

    def defaults(self) -> dict[str, Any]:
        """The content of the folder's `lapwan.json`."""
        guidance = {noise_expert.value: self.guidance for noise_expert in self.parts.transformer_files}
        return {"steps": 12, "guidance": guidance, "size": [self.size, self.size], "num_frames": 17, "fps": self.fps}


EMBEDDED: dict[Task, EmbeddedModel] = {
    "t2v": EmbeddedModel(A14B, "WanPipeline", 16, guidance=3.5, boundary=0.875),
    "i2v": EmbeddedModel(A14B, "WanImageToVideoPipeline", 36, guidance=2.0, boundary=0.9),
}


@cache
def _identity(parts_files: tuple[str, ...]) -> str:
    """Hash of everything that a folder is made from: the weights and this file."""
    digest = hashlib.sha256()
    for path in (*(WEIGHTS / name for name in parts_files), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def tiny_folder(task: Task) -> Path:
    """The embedded model's folder for `task`, built on first use (a second) and kept under `cache_root()`.

    Its name has a hash of what it is made from, so a new version of lapwan never reads an old folder.
    """
    folder = cache_root() / f"tiny-{task}-{_identity(EMBEDDED[task].parts.files)}"
    if not (folder / "model_index.json").is_file():
        with files.atomic_folder(folder, first_wins=True) as temporary:
            build(task, temporary)
    return folder


def _read(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: value.float() for key, value in load_file(WEIGHTS / name).items()}


def _transformer(parts: EmbeddedParts, noise_expert: NoiseExpert, in_channels: int) -> Any:
    from diffusers import WanTransformer3DModel

    state = _read(parts.transformer_files[noise_expert])
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :in_channels].clone()
    model = WanTransformer3DModel(in_channels=in_channels, **parts.transformer)
    model.load_state_dict(state)
    return model.eval()


def _vae(parts: EmbeddedParts) -> Any:
    from diffusers import AutoencoderKLWan

    statistics = json.loads((WEIGHTS / parts.latents_file).read_text(encoding="utf-8"))
    vae = AutoencoderKLWan(**parts.vae, **statistics)
    vae.load_state_dict(_read(parts.vae_file))
    return vae.eval()


def load_text_encoder(vocabulary: int) -> Any:
    """The shipped text encoder, in fp32 and eval mode; `vocabulary` is the tokenizer's size."""
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **TEXT))
    state = _read(TEXT_FILE)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]  # one tensor under two names
    model.load_state_dict(state)
    return model.eval()  # its dropout_rate is 0.1


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar, which would come before the single line of an error message."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def build(task: Task, folder: Path) -> None:
    """Write the model for `task` into `folder` with diffusers' pipeline class."""
    import diffusers
    import torch

    embedded = EMBEDDED[task]
    parts = embedded.parts
    with torch.random.fork_rng(devices=[]):  # modules draw initial weights, which the shipped ones replace
        tokenizer = make_tokenizer()
        components: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": load_text_encoder(len(tokenizer)),
            "vae": _vae(parts),
            **{e.component: _transformer(parts, e, embedded.in_channels) for e in parts.transformer_files},
        }
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
        flow_shift=embedded.flow_shift)
    pipeline = getattr(diffusers, embedded.pipeline)(
        **components, scheduler=scheduler, boundary_ratio=embedded.boundary)
    with _no_progress_bar():
        pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / DEFAULTS_FILE).write_text(json.dumps(embedded.defaults(), indent=2) + "\n", encoding="utf-8")
