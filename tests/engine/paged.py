"""Drives a model step by step over a small paged cache, as an engine does, keeping every logit row."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.model import DecoderModel
from engine.step import LoraState, StepInputs

UNUSED_PAGE = 2**31 - 1  # in page-table entries past a row's end: reading it is an error on any device


@dataclass(slots=True, eq=False)
class Row:
    """One sequence. done: tokens already in the cache. logits: one ``(vocab,)`` row per token in the cache."""

    tokens: list[int]
    slot: int
    done: int = 0
    pages: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        return self.done == len(self.tokens) - 1 and self.done > 0

    def append_greedy(self) -> None:
        """Take the likeliest next token, once the whole sequence is in the cache."""
        assert self.done == len(self.tokens)
        self.tokens.append(int(self.logits[-1].argmax()))


class PagedRunner:
    """Pages are handed out in shuffled order; a page that no row owns is full of NaN."""

    def __init__(
        self, model: DecoderModel, lora: LoraState | None = None, num_pages: int = 96, page_size: int = 4, seed: int = 0
    ) -> None:
        self.model, self.lora, self.page_size = model, lora, page_size
        self.kv = model.new_kv_cache(num_pages, page_size)
        self.random = random.Random(seed)
        self.free = list(range(num_pages))
        self.random.shuffle(self.free)
        self._poison(self.free)

    def step(self, decode: Sequence[Row], chunks: Sequence[tuple[Row, int]] = (), *, has_lora: bool = True) -> Tensor:
        """One forward pass: a token of each ``decode`` row, then ``n`` tokens of each ``(row, n)`` chunk.

        Appends to each row's logits and returns them all, ``(tokens, vocab)``.
        """
        inputs = self.plan(decode, chunks, has_lora=has_lora)
        logits = self.model.forward(inputs, self.kv, self.lora)
        assert logits.dtype == torch.float32
        start = 0
        for row, count in [*((row, 1) for row in decode), *chunks]:
            row.done += count
            row.logits.extend(logits[start : start + count].cpu())
            start += count
        return logits

    def plan(self, decode: Sequence[Row], chunks: Sequence[tuple[Row, int]], *, has_lora: bool = True) -> StepInputs:
        """The inputs of one step, every token's logits wanted. Gives the rows the pages that they need."""
        work = [*((row, 1) for row in decode), *chunks]
        tokens, positions, kv_slots, starts = [], [], [], [0]
        for row, count in work:
            end = row.done + count
            assert count > 0 and end <= len(row.tokens)
            while len(row.pages) * self.page_size < end:
                row.pages.append(self.free.pop())
            for position in range(row.done, end):
                page = row.pages[position // self.page_size]
                tokens.append(row.tokens[position])
                positions.append(position)
                kv_slots.append(page * self.page_size + position % self.page_size)
            starts.append(len(tokens))
        width = max(len(row.pages) for row, _ in work) + 2
        table = [row.pages + [UNUSED_PAGE] * (width - len(row.pages)) for row, _ in work]

        def tensor(values: Sequence[object], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.model.device)

        return StepInputs(
            token_ids=tensor(tokens, torch.int64),
            positions=tensor(positions, torch.int64),
            kv_slots=tensor(kv_slots, torch.int64),
            page_table=tensor(table),
            query_starts=tensor(starts),
            context_lens=tensor([row.done + count for row, count in work]),
            lora_indices=tensor([row.slot for row, _ in work]),
            logit_tokens=torch.arange(len(tokens), device=self.model.device),
            num_decode_rows=len(decode),
            num_lora_rows=len(decode),
            max_query_len=max((count for _, count in chunks), default=0),
            has_lora=has_lora and self.lora is not None,
        )

    def drop(self, row: Row) -> None:
        """Take a row's pages back and poison them."""
        self._poison(row.pages)
        self.free.extend(row.pages)
        self.random.shuffle(self.free)
        row.pages = []

    def mixed_run(self, rows: Sequence[Row], new_tokens: int, max_chunk: int) -> None:
        """Serve rows that arrive one after another, greedily: chunks of random length beside decoding rows.

        A row leaves, its pages poisoned, once ``new_tokens`` tokens after its prompt are in the cache.
        """
        targets = {row: len(row.tokens) + new_tokens for row in rows}
        waiting, active = list(rows), []
        while waiting or active:
            active.extend(waiting[:2])
            del waiting[:2]
            decode = [row for row in active if row.decoding and self.random.random() < 0.9]
            chunks = [
                (row, self.random.randint(1, min(max_chunk, len(row.tokens) - row.done)))
                for row in active
                if not row.decoding and self.random.random() < 0.9
            ]
            if not decode and not chunks:
                continue
            self.step(decode, chunks)
            for row in [*decode, *(row for row, _ in chunks)]:
                if row.done < len(row.tokens):
                    continue
                if row.done == targets[row]:
                    self.drop(row)
                    active.remove(row)
                else:
                    row.append_greedy()

    def _poison(self, pages: Sequence[int]) -> None:
        index = torch.tensor(pages, dtype=torch.int64, device=self.model.device)
        for cache in (*self.kv.keys, *self.kv.values):
            cache[index] = math.nan
