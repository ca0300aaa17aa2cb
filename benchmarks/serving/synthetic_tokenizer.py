"""A tokenizer for models of random weights: every id is a word, so that whatever they say is text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int, words: Sequence[str]) -> None:
    """Write ``tokenizer.json`` and a chat template. Ids of ``words`` from 1 on, then made-up ones; 0 is the unknown."""
    names = ["<unk>", *words, *(f"word{number}" for number in range(len(words) + 1, vocab_size))]
    vocabulary = {name: number for number, name in enumerate(names[:vocab_size])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
