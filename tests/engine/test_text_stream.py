"""Streamed text: pieces join to the decoded text, hold no broken characters, and end before a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from engine.text_stream import OutputText, StopStrings, TextStream
from engine.tokenizer import Tokenizer

TEXTS = st.text(st.one_of(st.sampled_from("ab éñß€机😀🦜\n"), st.characters(exclude_categories=["Cs"])), max_size=40)


def byte_level() -> Backend:
    """One token per byte, so every non-ASCII character is split; two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<pad>"])
    return backend


def byte_fallback() -> Backend:
    """The sentencepiece style: spaces as a mark, unknown characters as byte tokens, the first space stripped."""
    letters = {char: 256 + i for i, char in enumerate("▁abcdefgh")}
    vocab = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, **letters, "▁a": 300, "▁b": 301, "<unk>": 302}
    merges = [("▁", "a"), ("▁", "b")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<eos>"])
    return backend


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(request.param(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level(), tmp_path_factory.mktemp("tokenizer"))


def load(backend: Backend, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_dir(folder)


def stream(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    out = TextStream(tokenizer, context or [])
    return [*(out.push(token) for token in ids), out.flush()]


@settings(deadline=None)
@given(text=TEXTS)
def test_pieces_join_to_the_text_and_are_never_broken(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 257), max_size=60))
def test_any_bytes_join_to_what_decode_says(byte_tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = stream(byte_tokenizer, ids)
    assert "".join(pieces) == byte_tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


@settings(deadline=None)
@given(before=TEXTS, after=TEXTS)
def test_a_context_continues_the_prompt(tokenizer: Tokenizer, before: str, after: str) -> None:
    ids = tokenizer.encode("a" + before + after)
    for split in range(1, len(ids) + 1):
        whole, context = tokenizer.decode(ids), tokenizer.decode(ids[:split])
        if whole.startswith(context) and not context.endswith("\ufffd"):
            assert "".join(stream(tokenizer, ids[split:], ids[:split])) == whole[len(context) :]


def test_a_context_keeps_the_space_that_a_fresh_text_drops(tmp_path: Path) -> None:
    tokenizer = load(byte_fallback(), tmp_path)
    ids = tokenizer.encode("a b")
    assert stream(tokenizer, ids[1:], ids[:1])[0] == " b"
    assert stream(tokenizer, ids[1:])[0] == "b"


def test_special_tokens_show_nothing(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a<eos>€<pad>b")
    assert stream(byte_tokenizer, ids) == ["a", "", "", "", "€", "", "b", ""]


def test_a_decoder_that_takes_back_text_neither_fails_nor_repeats(tmp_path: Path) -> None:
    # Byte fallback turns a whole run of byte tokens into U+FFFD as soon as one of them is wrong.
    tokenizer = load(byte_fallback(), tmp_path)
    ids = [0x41, 0xE2, 257, 258]
    assert tokenizer.decode(ids) == "\ufffd\ufffdab"
    pieces = stream(tokenizer, ids)
    assert pieces[0] == "A"
    assert "".join(pieces).endswith("ab")
    assert "".join(pieces).count("A") == 1


def test_endless_broken_bytes_stay_cheap_and_exact(byte_tokenizer: Tokenizer) -> None:
    (euro,) = byte_tokenizer.encode("€")[:1]
    ids = [euro] * 500 + byte_tokenizer.encode("end")
    pieces = stream(byte_tokenizer, ids)
    assert "".join(pieces) == byte_tokenizer.decode(ids)
    assert sum(bool(piece) for piece in pieces) <= 3


class CountingTokenizer:
    """A real tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["€", "<eos>"])
def test_endless_tokens_without_text_cost_no_more_each_as_they_get_many(byte_tokenizer: Tokenizer, text: str) -> None:
    token = byte_tokenizer.encode(text)[0]
    costs = []
    for count in (1000, 8000):
        counting = CountingTokenizer(byte_tokenizer)
        out = TextStream(counting)  # type: ignore[arg-type]
        for _ in range(count):
            out.push(token)
        costs.append(counting.decoded / count)
    assert costs[1] < 2 * costs[0]


def reference_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character until the text ends with a stop string; the longest one if several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(
    text=st.text("ab€", max_size=30),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=4),
    data=st.data(),
)
def test_stop_strings_wherever_the_text_is_split(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher = StopStrings(stops)
    shown, found, rest = "", None, text
    while rest and found is None:
        size = data.draw(st.integers(1, len(rest)))
        piece, found = matcher.push(rest[:size])
        shown, rest = shown + piece, rest[size:]
        # What is held back is only what may still become a stop string.
        held = text[len(shown) : len(text) - len(rest)]
        assert found is not None or held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    assert (shown + matcher.flush(), found) == reference_cut(text, stops)


def test_stop_string_examples() -> None:
    matcher = StopStrings(["\n\n", "END"])
    assert [matcher.push(piece) for piece in ("one\n", "two E", "N")] == [("one", None), ("\ntwo ", None), ("", None)]
    assert matcher.push("Done") == ("", "END")
    assert StopStrings(["b", "ab"]).push("xab") == ("x", "ab")
    assert StopStrings([]).push("x") == ("x", None)


@settings(deadline=None)
@given(text=TEXTS, stop=st.text("ab €机", min_size=1, max_size=3))
def test_stops_on_a_token_stream(tokenizer: Tokenizer, text: str, stop: str) -> None:
    ids = tokenizer.encode(text)
    out, shown, found = OutputText(tokenizer, [stop]), "", None
    for token in ids:
        piece, found = out.push(token)
        shown += piece
        if found is not None:
            break
    else:
        piece, found = out.finish()
        shown += piece
    assert (shown, found) == reference_cut(tokenizer.decode(ids), [stop])


def test_bytes_held_back_at_the_end_may_complete_a_stop_string(byte_tokenizer: Tokenizer) -> None:
    out = OutputText(byte_tokenizer, ["\ufffd"])
    ids = byte_tokenizer.encode("a€")[:-1]
    assert [out.push(token) for token in ids] == [("a", None), ("", None), ("", None)]
    assert out.finish() == ("", "\ufffd")
