"""The fewest tokens that a text can have: certain, or not claimed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_tokenizer import byte_level, sentencepiece, write_folder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from router.text.length_bound import bytes_per_token
from router.text.text import load_text


def unigram() -> Tokenizer:
    """As T5 and NLLB write pieces; unknown letters become one token."""
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁hello", -2.0), ("a", -3.0), ("b", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def normalized(*steps: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


def with_added(**options: bool) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", **options)])
    return tokenizer


def pre_tokenized(step: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([step, pre_tokenizers.ByteLevel()])
    return tokenizer


def characters(**options: bool) -> Tokenizer:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", **options))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


CERTAIN: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "SentencePiece": sentencepiece,
    "composed": lambda: normalized(normalizers.NFC()),
    "compatible": lambda: normalized(normalizers.NFKC(), normalizers.Lowercase()),
    "split": lambda: pre_tokenized(pre_tokenizers.Split(Regex(r"\s+"), "isolated")),
    "an unknown letter each": lambda: characters(fuse_unk=False),
}
UNCERTAIN: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "fused letters": (unigram, "ж" * 4000),
    "fused letters of BPE": (lambda: characters(fuse_unk=True), "ж" * 4000),
    "a pattern": (
        lambda: normalized(normalizers.Replace(Regex(" {2,}"), " ")),
        "a" + " " * 4000,
    ),
    "stripped": (lambda: normalized(normalizers.Strip()), " " * 4000),
    "accents": (lambda: normalized(normalizers.NFD(), normalizers.StripAccents()), "\u0301" * 4000),
    "removed": (lambda: pre_tokenized(pre_tokenizers.Split(" ", "removed")), " " * 4000),
    "white space": (lambda: pre_tokenized(pre_tokenizers.WhitespaceSplit()), " " * 4000),
    "spaces of a token": (lambda: with_added(lstrip=True), " " * 4000 + "<mask>"),
}


@pytest.mark.parametrize("make", CERTAIN.values(), ids=CERTAIN)
def test_no_text_has_fewer_tokens_than_its_bytes_say(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    bound = bytes_per_token(tokenizer)
    assert bound is not None

    @given(
        st.text(max_size=60)
        | st.text(alphabet=" abé\u0301\u212b\u212a\U0001d400\uff76\uff9e\u1100\u1161\u11a8", max_size=60)
    )
    def holds(text: str) -> None:
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert len(text.encode()) <= bound * num_tokens

    holds()


@pytest.mark.parametrize(("make", "text"), UNCERTAIN.values(), ids=UNCERTAIN)
def test_nothing_is_claimed_where_a_long_text_may_have_few_tokens(
    make: Callable[[], Tokenizer], text: str
) -> None:
    tokenizer = make()
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) < 20, "the example shows nothing"
    assert bytes_per_token(tokenizer) is None


def test_a_text_that_is_shorter_than_it_looks_is_never_refused_for_its_bytes(tmp_path: Path) -> None:
    text = load_text(write_folder(tmp_path, unigram()))
    assert text.least_tokens("ж" * 100_000) == 0
