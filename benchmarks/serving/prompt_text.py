"""Prompts of a wanted number of tokens for a tokenizer that only the server knows."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Short and common, so that most tokenizers take few tokens for each.
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "question", "work"),
    *("number", "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot"),
    *("right", "study", "book", "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service"),
    *("friend", "father", "power", "hour", "game", "line", "end", "member", "law", "car", "city", "name", "team"),
)


@dataclass(frozen=True, slots=True)
class PromptText:
    """Random words; a prompt of n of them comes to ``fixed`` + n * ``per_word`` tokens, about."""

    fixed: float
    per_word: float

    @classmethod
    def fitted(cls, short: tuple[int, int], long: tuple[int, int]) -> PromptText:
        """From two measured prompts: (words, tokens) each.

        Raises ValueError when the longer one has no more tokens.
        """
        per_word = (long[1] - short[1]) / (long[0] - short[0])
        if per_word <= 0:
            raise ValueError(f"{long[0]} words took {long[1]} tokens and {short[0]} words {short[1]}: nothing to fit")
        return cls(short[1] - short[0] * per_word, per_word)

    def make(self, tokens: int, seed: int) -> str:
        """A prompt of about that many tokens, at least one word."""
        return words(max(round((tokens - self.fixed) / self.per_word), 1), seed)


def words(count: int, seed: int) -> str:
    """That many random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))
