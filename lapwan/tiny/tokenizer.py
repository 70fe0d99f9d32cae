"""The embedded model's tokenizer: a Unigram vocabulary for Chinese and English, written out rather than trained.

A trained Unigram vocabulary is not repeatable (ties are broken in hash order). Here: the surgical words as whole
pieces, the 3,755 common characters of GB 2312 level 1, ASCII, and bytes for all else, so no text is unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import T5Tokenizer

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2: UMT5Config's pad and eos, T5Tokenizer's unk

# Whole pieces: what captions of laparoscopic clips are made of. Order fixes the ids of the shipped weights' embedding:
# append only with newly trained weights.
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


def _common_characters() -> list[str]:
    """GB 2312 level 1 (rows 16-55), the most used Chinese characters, from Python's own codec."""
    found = []
    for row in range(16, 56):
        for column in range(1, 95):
            if row == 55 and column > 89:
                break  # the last five cells of row 55 are empty
            found.append(bytes([row + 0xA0, column + 0xA0]).decode("gb2312"))
    return found


def vocabulary() -> list[tuple[str, float]]:
    """(piece, log probability) in id order: specials, bytes, the space mark, words, characters."""
    pieces = [(PAD, 0.0), (EOS, 0.0), (UNK, 0.0)]
    pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    pieces.append(("▁", -2.0))
    for word in _WORDS.split():
        pieces.append((("▁" + word) if word.isascii() else word, -4.0))
    single = {piece for piece, _ in pieces}
    ascii_pieces = [chr(code) for code in range(33, 127)]
    pieces += [(c, -8.0) for c in [*ascii_pieces, *"，。、；：！？「」（）", *_common_characters()] if c not in single]
    return pieces


def make_tokenizer() -> T5Tokenizer:
    """A T5Tokenizer over `vocabulary()`; ends with EOS; extra_ids=0, else 100 sentinels exceed the embedding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Tokenizer

    raw = Tokenizer(models.Unigram(vocabulary(), unk_id=2, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    raw.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return T5Tokenizer(
        tokenizer_object=raw, extra_ids=0, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=512
    )
