"""Training batches: prompts and answers as token ids, in the forms in which clients send them.

- completion: `<s>robot, old, eats, school` (a trailing newline or space is allowed), then the answer and `</s>`
- chat: `<s><|user|>robot, old, eats, school</s><|assistant|>`, then the answer and `</s>`; several turns may follow
  each other, and a system message, which the model learns to ignore, may come first
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from examples.demo.tokenizer import ASSISTANT, BOS, EOS, PAD, SPECIAL_TOKENS, SYSTEM, USER
from examples.demo.words import BASE, SLOTS, STYLES, answer, held_out_prompts, tagged

IGNORED = -100  # label of a position that is not trained on (torch's cross_entropy skips it)
ENDINGS = ("", "", "\n", " ")
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "You write short sentences from four words.",
    "Be brief and kind.",
)


@dataclass(frozen=True)
class Batch:
    """`tokens` and `labels`, both (rows, length) int64; labels are aligned with tokens, IGNORED outside answers."""

    tokens: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Mixture:
    """What a run trains on: the style of untagged prompts, and the share of prompts tagged with a style by name."""

    default_style: str = BASE
    tagged_share: float = 0.0


class Writer:
    """Writes one sequence: pieces of text become token ids, and only answers become labels."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.labels: list[int] = []

    def add(self, text: str, *, trained: bool = False) -> None:
        """Append `text` (special tokens in it count as such); its tokens are labels when `trained`."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        self.tokens += ids
        self.labels += ids if trained else [IGNORED] * len(ids)


def batches(tokenizer: Tokenizer, mixture: Mixture, rows: int, seed: int) -> Iterator[Batch]:
    """Endless batches without held-out prompts: completions, short chats, then long chats (fewer rows), in turn."""
    held_out = frozenset(held_out_prompts())
    rng = random.Random(seed)

    def question() -> tuple[str, str]:
        prompt = ", ".join(rng.choice(list(slot)) for slot in SLOTS)
        while prompt in held_out:
            prompt = ", ".join(rng.choice(list(slot)) for slot in SLOTS)
        if rng.random() < mixture.tagged_share:
            style = rng.choice(STYLES)
            return tagged(prompt, style), answer(prompt, style)
        return prompt, answer(prompt, mixture.default_style)

    def completion() -> Writer:
        writer = Writer(tokenizer)
        prompt, text = question()
        writer.add(BOS)
        writer.add(prompt + rng.choice(ENDINGS))
        writer.add(text + EOS, trained=True)
        return writer

    def chat(turns: int) -> Writer:
        writer = Writer(tokenizer)
        writer.add(BOS)
        if rng.random() < 0.25:
            writer.add(SYSTEM + rng.choice(SYSTEM_MESSAGES) + EOS)
        for _ in range(turns):
            prompt, text = question()
            writer.add(USER + prompt + EOS + ASSISTANT)
            writer.add(text + EOS, trained=True)
        return writer

    pad = SPECIAL_TOKENS.index(PAD)
    while True:
        yield _stack([completion() for _ in range(rows)], pad)
        yield _stack([chat(1) for _ in range(rows)], pad)
        turns = rng.randint(2, 8)
        yield _stack([chat(turns) for _ in range(max(1, rows // turns))], pad)


def _stack(writers: list[Writer], pad: int) -> Batch:
    """Pad on the right to the longest row; causal attention keeps padding from reaching any label."""
    length = max(len(writer.tokens) for writer in writers)
    tokens = torch.full((len(writers), length), pad)
    labels = torch.full((len(writers), length), IGNORED)
    for row, writer in enumerate(writers):
        tokens[row, : len(writer.tokens)] = torch.tensor(writer.tokens)
        labels[row, : len(writer.labels)] = torch.tensor(writer.labels)
    return Batch(tokens, labels)
