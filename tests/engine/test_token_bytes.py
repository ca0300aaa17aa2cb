"""How many bytes tokens stand for: the most one can, and exactly which."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.token_bytes import most_bytes_per_token, raw_bytes

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model" / "tokenizer.json"
BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(*, missing: str = "") -> Backend:
    """Byte-level BPE with a few merges."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(missing))
    vocab = {char: number for number, char in enumerate([*alphabet, "ab", "Ġab", "ĠĠ", "ĠĠĠĠ"])}
    merges = [("a", "b"), ("Ġ", "ab"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def with_normalizer(normalizer: normalizers.Normalizer) -> Backend:
    backend = byte_level()
    backend.normalizer = normalizer
    return backend


def with_pre_tokenizer(*before: pre_tokenizers.PreTokenizer) -> Backend:
    backend = byte_level()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    return backend


def with_added(token: AddedToken, normalizer: normalizers.Normalizer | None = None) -> Backend:
    backend = byte_level()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([token])
    return backend


def sentencepiece_style() -> Backend:
    """Spaces as a mark, unknown characters as byte tokens, and an added token that the normalizer makes longer."""
    vocab = {**BYTE_TOKENS, "▁": 256, "a": 257, "b": 258, "▁a": 259, "<unk>": 260}
    model = models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_tokens([AddedToken("    ", normalized=True, special=False)])
    return backend


BOUNDED: dict[str, Callable[[], Backend]] = {
    "demo": lambda: Backend.from_file(str(DEMO)),
    "byte-level": byte_level,
    "added": lambda: with_added(AddedToken("<|a very long token|>", normalized=False)),
    "NFC": lambda: with_normalizer(normalizers.NFC()),
    "NFKC": lambda: with_normalizer(normalizers.Sequence([normalizers.NFKC()])),
    "split": lambda: with_pre_tokenizer(
        pre_tokenizers.Split(Regex(r"\s+|\w+"), "isolated"), pre_tokenizers.Digits(individual_digits=True)
    ),
    "sentencepiece": sentencepiece_style,
}
PIECES = st.sampled_from(
    ["a", "b", " ", "    ", "▁▁▁▁▁", "<|a very long token|>", "ñ", "🦜", "\u1fbe\u0308\u0301", "Ａ", "\u212a"]
)
TEXTS = st.lists(st.one_of(PIECES, st.characters(exclude_categories=["Cs"])), max_size=40).map("".join)


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_more_bytes_than_its_tokens_may_stand_for(name: str) -> None:
    backend = BOUNDED[name]()
    most = most_bytes_per_token(backend)
    assert most is not None

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    @example("\u1fbe\u0308\u0301" * 20)
    @example("▁" * 40)
    @example("    " * 10)
    @example("<|a very long token|>" * 5)
    def bounded(text: str) -> None:
        assert len(text.encode()) <= most * len(backend.encode(text, add_special_tokens=False).ids)

    bounded()


def test_the_bound_is_the_longest_token() -> None:
    assert most_bytes_per_token(byte_level()) == 4  # four spaces
    assert most_bytes_per_token(with_added(AddedToken("é" * 5, normalized=False))) == 10
    assert most_bytes_per_token(sentencepiece_style()) == 15  # the mark and "    ", normalized, with marks of 3 bytes


def test_unicode_normal_forms_shrink_no_character_beyond_what_the_bound_grants() -> None:
    """One composed character stands for its decomposition, and each part of it may have been 4 bytes."""
    granted = most_bytes_per_token(with_normalizer(normalizers.NFC())) or 0
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    worst = max(4 * len(unicodedata.normalize("NFD", char)) / len(char.encode()) for char in characters)
    assert worst <= granted / 4  # four spaces


UNBOUNDED: dict[str, Callable[[], Backend]] = {
    "strip": lambda: with_normalizer(normalizers.Strip()),
    "replace with less": lambda: with_normalizer(normalizers.Replace("aaaa", "b")),
    "replace by pattern": lambda: with_normalizer(normalizers.Replace(Regex("a+"), "bbbbbbbb")),
    "in a sequence": lambda: with_normalizer(normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])),
    "lowercase": lambda: with_normalizer(normalizers.Lowercase()),
    "white space dropped": lambda: with_pre_tokenizer(pre_tokenizers.WhitespaceSplit()),
    "separators dropped": lambda: with_pre_tokenizer(pre_tokenizers.Split(" ", "removed")),
    "punctuation dropped": lambda: with_pre_tokenizer(pre_tokenizers.Punctuation("removed")),
    "lstrip": lambda: with_added(AddedToken("<x>", lstrip=True)),
    "rstrip": lambda: with_added(AddedToken("<x>", rstrip=True)),
    "a byte without a token": lambda: byte_level(missing="Z"),
    "unknown words": lambda: Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
    "unknown characters": lambda: Backend(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
    "empty": lambda: Backend(models.BPE()),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_may_swallow_text_has_no_bound(name: str) -> None:
    assert most_bytes_per_token(UNBOUNDED[name]()) is None


def test_raw_bytes_of_a_byte_level_token() -> None:
    backend = byte_level()
    for text in ("€ ab", "\n\x00\x7f\xad", "🦜"):
        contents = backend.encode(text).tokens
        assert b"".join(raw_bytes(backend, content) or b"?" for content in contents) == text.encode()
    every = {raw_bytes(backend, char) for char in pre_tokenizers.ByteLevel.alphabet()}
    assert every == {bytes([byte]) for byte in range(256)}
    assert raw_bytes(backend, "日") is None, "not of the alphabet"


def test_raw_bytes_of_a_byte_token() -> None:
    backend = sentencepiece_style()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert [raw_bytes(backend, content) for content in ("<0xE2>", "<0x0A>")] == [b"\xe2", b"\n"]
    assert raw_bytes(backend, "<0xZZ>") is None


def test_raw_bytes_are_unknown_under_another_decoder() -> None:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    assert raw_bytes(backend, "Ġab") is None
    backend = Backend.from_str(json.dumps({**json.loads(backend.to_str()), "decoder": None}))
    assert raw_bytes(backend, "Ġab") is None
