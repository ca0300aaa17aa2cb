"""Text to token ids and back, with ``tokenizers`` and Jinja alone (transformers would cost seconds of import)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from engine.chat_template import ChatTemplate
from engine.request import CONTEXT_LENGTH_EXCEEDED, InvalidRequest
from engine.token_bytes import most_bytes_per_token, raw_bytes

# Vocabularies that need another library to read; the remedy is the same for all.
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "spiece.model")

_BROKEN = "\ufffd"  # what bytes decode to that are no character


class Tokenizer:
    """A model's tokenizer and chat template.

    Ids and text equal transformers' (``encode``, ``apply_chat_template``, ``decode``), but for one thing: spaces
    before punctuation are never cleaned up in decoded text, which a stream cannot take back.

    name: the model's folder, for messages. vocab_size: ids that decode, added tokens included.
    eos_token_ids: generation_config.json's (config.json's without one), and the tokenizer's own ``eos_token``.
    special_tokens: ``bos_token`` and so on, those that are set. template: what chats are rendered with.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
        template: ChatTemplate,
        name: str,
    ) -> None:
        self._backend = backend
        self.template = template
        self._token_texts: dict[int, str] = {}
        self._most_bytes_per_token = most_bytes_per_token(backend)
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = eos_token_ids
        self.name = name
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and the small JSON files beside it.

        Raises ValueError when there is no readable tokenizer.json, naming the remedy.
        """
        folder = Path(path).resolve()
        file = folder / "tokenizer.json"
        if not file.is_file():
            others = [name for name in _OTHER_FORMATS if (folder / name).is_file()]
            hint = (
                f'only {", ".join(others)}. Convert it once: python -c "from transformers import AutoTokenizer; '
                f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
                if others
                else "no other tokenizer file either: copy it from the model's repository"
            )
            raise ValueError(f"{file} does not exist; the folder has {hint}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more precise
            raise ValueError(
                f"{file} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        config = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
        special = {
            name: _content(value) for name, value in config.items() if name.endswith("_token") and _is_token(value)
        }
        _add_missing_tokens(backend, config, special)
        return cls(
            backend,
            special_tokens=special,
            eos_token_ids=_eos_token_ids(folder, backend, special),
            template=ChatTemplate.from_dir(folder, config, special, folder.name),
            name=folder.name,
        )

    def encode(
        self, text: str, *, add_special_tokens: bool = True, most_tokens: int | None = None, param: str = "prompt"
    ) -> list[int]:
        """Token ids, with special tokens round the text as the model's post-processor says.

        Other threads run meanwhile. most_tokens: refuse text that surely has more, without tokenizing it (other text
        may have more all the same). param: what the client calls this text.
        Raises InvalidRequest for such text, and for a lone surrogate, which JSON can carry but UTF-8 cannot.
        """
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds a lone surrogate, {text[error.start]!r}, at character {error.start}: no valid Unicode",
                param,
            ) from error
        most = self._most_bytes_per_token
        if most_tokens is not None and most is not None and size > most_tokens * most:
            raise InvalidRequest(
                f"the prompt has {size} bytes, too many for a context of {most_tokens} tokens, completion included: "
                f"no token of {self.name} stands for more than {most}",
                param,
                CONTEXT_LENGTH_EXCEEDED,
            )
        # Alone of encode's kind, the batch methods give the GIL back; this one also leaves out offsets, unused here.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def spelled(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them, such as ``Ġthe``; nothing for an id that it does not hold."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def token_text(self, token_id: int) -> str:
        """One token decoded alone, special or not: how log probabilities name it."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes behind ``token_text``, also where they are only a part of a character; None when unknown."""
        text = self.token_text(token_id)
        if _BROKEN not in text:
            return text.encode()
        content = self._backend.id_to_token(token_id)
        return None if content is None else raw_bytes(self._backend, content)

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, with the tokens that only other files name."""
        return self._backend.to_str()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The chat template's text: see ``ChatTemplate.render`` for the options and errors."""
        return self.template.render(messages, **options)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], most_tokens: int | None = None, /, **options: Any
    ) -> list[int]:
        """Token ids of the rendered chat. The template writes the special tokens itself, so none are added.

        most_tokens: as for ``encode``. options and errors: ``render_chat``'s, and ``encode``'s with param "messages".
        """
        return self.encode_rendered(self.render_chat(messages, **options), most_tokens)

    def encode_rendered(self, text: str, most_tokens: int | None = None) -> list[int]:
        """Token ids of a chat that was rendered already, otherwise as ``encode_chat``."""
        return self.encode(text, add_special_tokens=False, most_tokens=most_tokens, param="messages")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _content(token: str | Mapping[str, Any]) -> str:
    """Tokens are written as text or as ``{"content": text, ...}``."""
    return token if isinstance(token, str) else str(token["content"])


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Special tokens that only tokenizer_config.json knows, in the order transformers adds them."""
    declared = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    wanted: list[AddedToken] = [
        AddedToken(
            token["content"],
            single_word=token.get("single_word", False),
            lstrip=token.get("lstrip", False),
            rstrip=token.get("rstrip", False),
            normalized=token.get("normalized", not token.get("special", False)),
            special=token.get("special", False),
        )
        for _, token in declared
    ]
    names = [*special.values(), *map(_content, extra.values() if isinstance(extra, dict) else extra)]
    wanted += [AddedToken(name, special=True, normalized=False) for name in names]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in wanted:
        if token.content not in known:
            known.add(token.content)
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])


def _eos_token_ids(folder: Path, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> tuple[int, ...]:
    found = _read(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = _read(folder / "config.json").get("eos_token_id")
    ids = list(found) if isinstance(found, list) else [found]
    if "eos_token" in special:
        ids.append(backend.token_to_id(special["eos_token"]))
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))
