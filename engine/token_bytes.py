"""The bytes that tokens stand for: how many one can at most, and which ones exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import models

# A composed character of n bytes stands for at most 1.5 n decomposed ones (U+0390: 2 bytes, 3 characters), each of
# which the text may have written with 4 bytes (compatibility letters and the like).
_NORMAL_FORM_SHRINKS = 6
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes, in order, for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def raw_bytes(backend: tokenizers.Tokenizer, content: str) -> bytes | None:
    """The bytes of a vocabulary entry, of parts of characters too; None when the decoder does not simply tell them."""
    kinds = [step["type"] for step in _steps(backend.decoder, "decoders")]
    if kinds == ["ByteLevel"] and all(char in _BYTE_OF_CHAR for char in content):
        return bytes(_BYTE_OF_CHAR[char] for char in content)
    if "ByteFallback" in kinds and (found := _BYTE_TOKEN.fullmatch(content)):
        return bytes([int(found[1], 16)])
    return None


def most_bytes_per_token(backend: tokenizers.Tokenizer) -> int | None:
    """UTF-8 bytes of text that one token can stand for at most, or None when there is no such number.

    Never too low: it is given only where every byte of every text is known to reach some token, so not with
    normalizers that drop text, tokens that swallow spaces, or vocabularies in which unknown text becomes one token.
    """
    shrinks = _normalizer_shrinks(backend)
    added = backend.get_added_tokens_decoder().values()
    if shrinks is None or any(token.lstrip or token.rstrip for token in added):
        return None
    if not all(_keeps_all(step) for step in _steps(backend.pre_tokenizer, "pretokenizers")):
        return None
    vocab = backend.get_vocab(with_added_tokens=False)
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(backend.pre_tokenizer, "pretokenizers"))
    if not _takes_any_text(backend.model, vocab, byte_level):
        return None
    # Byte-level text has one character a byte by the time that it meets the vocabulary.
    longest = max(len(content) if byte_level else len(content.encode()) for content in vocab)
    for token in added:  # found in the text as it is, or as the normalizer leaves it, which may be longer
        forms = [token.content]
        if backend.normalizer is not None:
            forms.append(backend.normalizer.normalize_str(token.content))
        longest = max(longest, *(len(form.encode()) for form in forms))
    return longest * shrinks


def _takes_any_text(model: Any, vocab: Mapping[str, int], byte_level: bool) -> bool:
    """Whether each character of a text, or each byte of it, has a token of its own to fall back on."""
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if byte_level:
        return all(char in vocab for char in _BYTE_OF_CHAR)
    return model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256))


def _normalizer_shrinks(backend: tokenizers.Tokenizer) -> int | None:
    """By which factor normalizing may shorten a text at most; None for any."""
    shrinks = 1
    for step in _steps(backend.normalizer, "normalizers"):
        match step:
            case {"type": kind} if kind in _NORMAL_FORMS:
                shrinks *= _NORMAL_FORM_SHRINKS
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new.encode()) >= len(
                old.encode()
            ):
                pass
            case _:
                return None
    return shrinks


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer only cuts, and drops nothing."""
    match step["type"]:
        case "ByteLevel" | "Digits" | "Metaspace":
            return True
        case "Split" | "Punctuation":
            return step.get("behavior") in ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
    return False


def _steps(part: Any, children: str) -> list[dict[str, Any]]:
    """A part of the tokenizer as tokenizer.json writes it, sequences laid out flat. children: their key."""
    if part is None:
        return []
    flat: list[dict[str, Any]] = []
    pending = [json.loads(part.__getstate__())]
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = [*step[children], *pending]
        else:
            flat.append(step)
    return flat
