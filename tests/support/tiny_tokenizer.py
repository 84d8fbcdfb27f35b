"""Tokenizers of a few hundred tokens in checkpoint folders, made in memory."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
CORPUS = [
    "Once upon a time there was a hen. The hen said: stop, please stop!",
    "naïve café, 東京 and 😀 and 👩‍🚀 went home. def main(): return 0",
] * 4
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "[{{ message.role }}{% if message.name %}={{ message.name }}{% endif %}]{{ message.content }}"
    "{% if not loop.last or message.role != 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if mood %}({{ mood }}){% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level(vocab_size: int = 400) -> Tokenizer:
    """As GPT-2, Qwen and the demo model write bytes; ids 0 to 2 are <unk>, <s>, </s>, and a text begins with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = _begins_with_bos()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama and Mistral write bytes: spaces as ▁, one before the text, other characters as <0xE2> and so on."""
    pieces = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁"]
    pieces += sorted({"▁" + character for character in "abcdefghijklmnopqrstuvwxyz"})
    pieces += list("abcdefghijklmnopqrstuvwxyz,.!é")
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [("▁", "▁")] + [
        ("▁", piece[1:]) for piece in pieces if len(piece) == 2 and piece != "▁▁" and piece[0] == "▁"
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token=UNK, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    tokenizer.post_processor = _begins_with_bos()
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """The tokenizer's files as a checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "clean_up_tokenization_spaces": False}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _begins_with_bos() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
