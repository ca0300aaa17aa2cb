"""What requests ask to know of their own prompts: log probabilities of its tokens, or one vector for all of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from engine.host_copy import to_host
from engine.request import GenerationChunk, GenerationRequest, TokenLogprob
from kernels.sampling import log_probs

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

# Logits at once, 160 MiB with what a softmax over them takes: 130 tokens of Llama 3's 128 256. A prompt's would be
# gigabytes, and pieces that are larger gain nothing: the product is bound by its operations from there on.
MOST_LOGITS = 2**24


class PromptReading(ABC):
    """Gathers chunk by chunk, as they are launched and without waiting for the device.

    A prompt that is begun again is read again. The step loop's thread alone touches it until ``landed``, then the
    reader's.

    whole_prompt: every token must be computed, so none may come from the prefix cache.
    """

    def __init__(self, request: GenerationRequest, *, whole_prompt: bool) -> None:
        self.prompt = request.prompt_token_ids
        self.whole_prompt = whole_prompt
        self.landed = False

    @abstractmethod
    def take(self, hidden: Tensor, start: int, lm_head: Tensor) -> None:
        """Read tokens ``start`` and on. hidden: (tokens, hidden_size), behind the last norm, valid only now.
        lm_head: (vocab_size, hidden_size)."""

    @abstractmethod
    def tell(self, chunk: GenerationChunk, tokenizer: Tokenizer | None) -> GenerationChunk:
        """The request's first chunk, with what was read. Any thread; a long prompt takes a good part of a second."""

    @abstractmethod
    def _values(self) -> Tensor: ...

    def land(self) -> bool:
        """Every step that read some of it is done. Returns False when what was read holds NaN or infinities."""
        self.landed = True
        return bool(self._values().isfinite().all())


class PromptLogprobs(PromptReading):
    """Raw log probabilities of all tokens but the first, and of the ``top`` likeliest in the place of each."""

    def __init__(self, request: GenerationRequest, top: int) -> None:
        super().__init__(request, whole_prompt=True)
        self._top = top
        self._read: list[tuple[Tensor, Tensor, Tensor]] = []  # of each chunk, see log_probs

    def take(self, hidden: Tensor, start: int, lm_head: Tensor) -> None:
        """See ``PromptReading``. The LM head is applied in pieces of ``MOST_LOGITS``."""
        if start == 0:
            self._read.clear()
        targets = self.prompt[start + 1 : start + 1 + len(hidden)]  # of the prompt's last token there is none
        if not targets:
            return
        device = hidden.device
        pinned = torch.tensor(targets, dtype=torch.int64, pin_memory=device.type == "cuda")
        ids = pinned.to(device, non_blocking=True)
        size = max(MOST_LOGITS // len(lm_head), 1)
        pieces = [
            log_probs(functional.linear(hidden[at : at + len(wanted)], lm_head), wanted, self._top)
            for at, wanted in zip(range(0, len(targets), size), ids.split(size), strict=True)
        ]
        chosen, tops, values = (to_host(torch.cat(parts)) for parts in zip(*pieces, strict=True))
        self._read.append((chosen, tops, values))

    def tell(self, chunk: GenerationChunk, tokenizer: Tokenizer | None) -> GenerationChunk:
        """See ``PromptReading``."""

        def name(token_id: int) -> str:
            return "" if tokenizer is None else tokenizer.token_text(token_id)

        rows = (row for part in self._read for row in zip(*(tensor.tolist() for tensor in part), strict=True))
        told = tuple(
            TokenLogprob(
                token, chosen, name(token), tuple((i, value, name(i)) for i, value in zip(tops, values, strict=True))
            )
            for token, (chosen, tops, values) in zip(self.prompt[1:], rows, strict=True)
        )
        return replace(chunk, prompt_logprobs=(None, *told))

    def _values(self) -> Tensor:
        return torch.cat([chosen for chosen, _, _ in self._read]) if self._read else torch.zeros(0)


class PromptEmbedding(PromptReading):
    """The hidden states' mean over the prompt, summed in float64 so that chunks hardly matter, or the last one."""

    def __init__(self, request: GenerationRequest) -> None:
        super().__init__(request, whole_prompt=request.pooling == "mean")
        self._sum: Tensor | None = None
        self._vector: Tensor | None = None

    def take(self, hidden: Tensor, start: int, lm_head: Tensor) -> None:
        """See ``PromptReading``."""
        if self.whole_prompt:
            part = hidden.sum(0, dtype=torch.float64)
            self._sum = part if start == 0 or self._sum is None else self._sum + part
        if start + len(hidden) == len(self.prompt):
            vector = hidden[-1].double() if self._sum is None else self._sum / len(self.prompt)  # a copy
            self._vector = to_host(vector.float())

    def tell(self, chunk: GenerationChunk, tokenizer: Tokenizer | None) -> GenerationChunk:
        """See ``PromptReading``."""
        return replace(chunk, embedding=tuple(self._values().tolist()))

    def _values(self) -> Tensor:
        assert self._vector is not None
        return self._vector


def reading_for(request: GenerationRequest) -> PromptReading | None:
    """What gathers what the request asks for; None for nothing."""
    if request.pooling is not None:
        return PromptEmbedding(request)
    top = request.sampling.prompt_logprobs
    return None if top is None else PromptLogprobs(request, top)
