"""One request on its way through the engine: the state that scheduler, runner and engine share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapter_store.packed import PackedAdapter
    from adapter_store.slots import Slot
    from engine.grammar import GrammarState
    from engine.output import OutputQueue
    from engine.prompt_reading import PromptReading
    from engine.request import GenerationRequest
    from engine.text_stream import OutputText


PENDING = -1  # in place of a token that is drawn but not read yet


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens and what it holds. Touched by the step loop's thread only.

    arrival: grows with every request; decides order. max_tokens: prompt and completion together. seed: of its draws.
    text: the visible text, None for a model without a tokenizer. queue: where results go. reading: what its prompt is
    still read for; None for nothing.
    adapter: its weights in host memory; None for the base model, and while a slot holds them already.
    digest: the adapter that its slot must hold; None for the base model, and until an adapter's name is resolved.
    tenant: whose service it counts as: who asks, or the adapter's name where nobody says.
    plain: it draws from its logits as the model gives them. draws: it does at all.
    tokens: prompt, then what was generated, with PENDING at the end for what is drawn but not read. known: how many of
    them are read. awaited: the last token's index among those that the step launched last drew; -1 when it is known.
    computed: how many tokens have keys and values in ``pages``, or will have once the launched steps are done.
    page_keys: names of what its first full pages hold, see ``prefix_keys``; published: how many the page pool knows.
    grammar: how far it has come in what its request asks it to be. end_tokens: those that end it. place: where the
    device keeps what changes its logits, mask_row: which of the step's masks is its own; -1 for none (``ChangedRows``).
    preempted: it ran before and waits again. age: admissions of other tenants' later arrivals while it was the first of
    its tenant. overtaken: admissions of those behind it in the order while it had no slot to go to. draining: the
    digest that its starvation keeps from being admitted again, so that a slot comes free. waits_since: when it was
    queued last (monotonic seconds). arrived_at, queued_at, first_step_at, first_token_at: when it came, and when it
    first got there, 0 until then. drawn_at: when its last token was read.
    """

    request: GenerationRequest
    arrival: int
    max_tokens: int
    seed: int
    text: OutputText | None = None
    queue: OutputQueue | None = None
    reading: PromptReading | None = None
    adapter: PackedAdapter | None = None
    digest: str | None = None
    tenant: str = field(init=False)
    plain: bool = field(init=False)
    draws: bool = field(init=False)
    tokens: list[int] = field(default_factory=list)
    known: int = 0
    awaited: int = -1
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    published: int = 0
    slot: Slot | None = None
    grammar: GrammarState | None = None
    end_tokens: tuple[int, ...] = ()
    place: int = -1
    mask_row: int = -1
    preempted: bool = False
    age: int = 0
    overtaken: int = 0
    draining: str | None = None
    waits_since: float = 0.0
    arrived_at: float = field(default_factory=time.monotonic)
    queued_at: float = 0.0
    first_step_at: float = 0.0
    first_token_at: float = 0.0
    drawn_at: float = 0.0
    finished: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.known = len(self.tokens)
        self.plain = self.request.sampling.plain
        self.draws = self.request.draws
        self.tenant = self.request.tenant or self.request.adapter or ""
        self.digest = self.request.adapter_digest if self.adapter is None else self.adapter.digest

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        """Generated tokens that are read."""
        return self.known - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Whether only the last token is still to be computed, to draw the next."""
        return 0 < self.computed == len(self.tokens) - 1 and self.draws

    @property
    def full(self) -> bool:
        """Whether its last token is drawn, read or not."""
        return len(self.tokens) >= self.max_tokens

    @property
    def held(self) -> bool:
        """Whether what it may draw next is not known: its last token is not read, or its grammar not that far."""
        return self.grammar is not None and (self.awaited >= 0 or not self.grammar.ready)

    def launched(self, end: int, drawn: int | None) -> None:
        """A step was launched that computes the tokens up to ``end`` and draws one as its ``drawn``-th, unless None."""
        self.computed = end
        if drawn is not None:
            self.tokens.append(PENDING)
            self.awaited = drawn

    def read(self, token: int) -> None:
        """The first token that was drawn and not read is ``token``."""
        assert self.tokens[self.known] == PENDING
        self.tokens[self.known] = token
        self.known += 1
        if self.known == len(self.tokens):
            self.awaited = -1

    def land(self) -> bool:
        """What was read of its prompt, if anything, is complete; returns False when that is not finite."""
        reading, self.reading = self.reading, None
        return reading is None or reading.land()

    @property
    def lora_index(self) -> int:
        """The adapter's row in the slot table; -1 for the base model."""
        return -1 if self.slot is None else self.slot.index
