"""The tensors of one step, as the model's forward pass reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.lora_group import LoraGroup


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One mixed batch, flattened to tokens. Rows with one decode token come first, then prefill chunks.

    Shapes: T tokens, R rows, O rows whose logits are wanted. All tensors are on the model's device.
    A padding row (to fill a captured batch size) is a decode row of context length 0, KV slot -1 and index -1;
    its token and position may be any valid ones, and its logits mean nothing.
    """

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    kv_slots: Tensor  # (T,) int64: page * page_size + offset where this token's K and V go
    page_table: Tensor  # (R, max_pages) int32; entries past a row's length are never read
    query_starts: Tensor  # (R + 1,) int32: first token of each row
    context_lens: Tensor  # (R,) int32: cached tokens plus this step's
    lora_indices: Tensor  # (R,) int32: adapter slot, -1 for the base model
    logit_tokens: Tensor  # (O,) int64: the tokens whose logits are wanted
    num_decode_rows: int
    num_lora_rows: int  # decode rows from the first on that may have an adapter; those after them have none
    max_query_len: int  # longest prefill chunk (0 without prefill rows)
    has_lora: bool  # False skips every LoRA launch


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew, for each row whose logits were computed: ids (O,) int64, their raw log probabilities (O,) fp32,
    NaN where a row's logits are of no use, and the logits (O, vocab_size). Valid until the next step is launched.

    hidden: (tokens, hidden_size) of the chunks of prompts, one after the other, behind the last norm, or more.
    places: where in the first three each row that draws a token is, in the plan's order.
    """

    ids: Tensor
    logprobs: Tensor
    logits: Tensor
    hidden: Tensor
    places: Sequence[int]


@dataclass(frozen=True, slots=True)
class KVCache:
    """Paged keys and values: per layer ``(num_pages, page_size, kv_heads, head_dim)`` each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[1]


@dataclass(frozen=True, slots=True)
class LoraState:
    """What the LoRA kernels read: adapters packed in one arena and the table that says where.

    arena: (elements,) in the model's dtype. slot_table: (slots, 2) int64, element offset and rank.
    groups: per layer, group name -> LoraGroup. max_rank: the largest class's packed rank.
    """

    arena: Tensor
    slot_table: Tensor
    groups: tuple[dict[str, LoraGroup], ...]
    max_rank: int
