"""What one generation asks for and what it yields. Imports nothing of ours: everything else imports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

FinishReason = Literal["stop", "length", "abort"]
Pooling = Literal["mean", "last"]
GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"  # OpenAI's name
MOST_BIASES = 1024
_INT64 = 2**63 - 1  # what a step's tensors hold


class InvalidRequest(ValueError):
    """A request that can never run as asked (HTTP 400). ``param`` names the offending field.

    code: ``CONTEXT_LENGTH_EXCEEDED`` for what does not fit the context or the KV cache, else None.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, str | None, str | None]]:
        return (type(self), (self.args[0], self.param, self.code))


class EngineOverloaded(RuntimeError):
    """The waiting queue is full: try again later (HTTP 503 with Retry-After)."""


class EngineDead(RuntimeError):
    """The step loop stopped after an internal error; the replica must be replaced."""


class GenerationFailed(RuntimeError):
    """This request alone failed inside the model, such as with logits that are no numbers (HTTP 500)."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole completion must be; whether ``text`` can be read as such is for ``engine.grammar`` to say.

    text: nothing for json_object (any JSON object); for json_schema the schema as JSON; for choice a JSON list of
    strings; for regex and lark an expression in llguidance's dialect.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise InvalidRequest(
                f"grammar is of kind {self.kind!r}, not one of {', '.join(get_args(GrammarKind))}", "grammar"
            )
        if not isinstance(self.text, str):
            raise InvalidRequest(
                f"the {self.kind} grammar is a {type(self.text).__name__} but must be a string", "grammar"
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p in (0, 1]. min_p in [0, 1], relative to the most
    likely token. seed: None draws one. max_tokens: None fills the context, 0 is for what is told of the prompt alone.
    stop: strings, cut from the text.
    logprobs: None for none, n >= 0 for the chosen token and the n likeliest, from the raw logits. prompt_logprobs: the
    same of the prompt's tokens; the prompt is computed whole then, whatever the prefix cache holds.

    What follows changes the logits before all of that, in this order. repetition_penalty: those of tokens in the prompt
    or generated are divided by it where positive, multiplied where negative (Keskar et al., "CTRL", 2019; as Hugging
    Face). frequency_penalty times how often a token was generated, and presence_penalty once it was, are taken off its
    logit, and logit_bias, pairs of token id and bias, is added (as OpenAI). min_tokens: no end of sequence and none of
    stop_token_ids before so many tokens. grammar: the completion is of this form, and ends where it is complete.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        most = self.max_tokens if isinstance(self.max_tokens, int) else None
        for name, ok, allowed in (
            ("temperature", _number(self.temperature, 0.0, 100.0), "between 0 and 100"),
            ("top_k", _integer(self.top_k, 0, _INT64), "0 (keep all) or more, and below 2**63"),
            ("top_p", _number(self.top_p, 0.0, 1.0) and self.top_p > 0.0, "above 0 and at most 1"),
            ("min_p", _number(self.min_p, 0.0, 1.0), "between 0 and 1"),
            ("seed", self.seed is None or _integer(self.seed, 0, _INT64), "an integer between 0 and 2**63 - 1"),
            ("max_tokens", self.max_tokens is None or _integer(self.max_tokens, 0), "an integer of 0 or more"),
            ("stop", _tuple_of(str, self.stop) and all(self.stop), "a tuple of non-empty strings"),
            ("stop_token_ids", _tuple_of(int, self.stop_token_ids), "a tuple of integers"),
            ("logprobs", self.logprobs is None or _integer(self.logprobs, 0, 20), "an integer between 0 and 20"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or _integer(self.prompt_logprobs, 0, 20),
                "an integer between 0 and 20",
            ),
            ("presence_penalty", _number(self.presence_penalty, -2.0, 2.0), "between -2 and 2"),
            ("frequency_penalty", _number(self.frequency_penalty, -2.0, 2.0), "between -2 and 2"),
            (
                "repetition_penalty",
                _number(self.repetition_penalty, 0.0, 10.0) and self.repetition_penalty > 0.0,
                "above 0 and at most 10",
            ),
            ("min_tokens", _integer(self.min_tokens, 0, most), "an integer between 0 and max_tokens"),
            ("grammar", self.grammar is None or isinstance(self.grammar, Grammar), "a Grammar"),
        ):
            if not ok:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r} but must be {allowed}", name)
        self._check_biases()

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before count."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    @property
    def plain(self) -> bool:
        """Whether the logits are drawn from as the model gives them."""
        return not (self.penalised or self.logit_bias or self.min_tokens or self.grammar is not None)

    def _check_biases(self) -> None:
        if not isinstance(self.logit_bias, tuple) or len(self.logit_bias) > MOST_BIASES:
            raise InvalidRequest(f"logit_bias must be at most {MOST_BIASES} pairs of token id and bias", "logit_bias")
        for entry in self.logit_bias:
            pair = isinstance(entry, tuple) and len(entry) == 2
            if not (pair and _integer(entry[0], 0, _INT64) and _number(entry[1], -100.0, 100.0)):
                raise InvalidRequest(
                    f"logit_bias holds {entry!r} but must hold token ids, each with a bias between -100 and 100",
                    "logit_bias",
                )
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequest("logit_bias names a token twice: send one bias for each", "logit_bias")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One row: a tokenized prompt for the base model or one adapter.

    adapter: None for the base model, else what the adapter catalog resolves: a catalog name or a pinned
    reference such as ``local:/path`` or ``hub:org/name@<commit>``. adapter_digest: when set, the content the
    caller resolved; other content is refused, never served. tenant: who is asking, for
    fairness among tenants; empty is the adapter's name. share: that tenant's part of the service from now on; None
    leaves it as the engine's settings say. api_token: with which the adapter's source showed it to the caller; the
    engine itself has no use for it. pooling: generate nothing, but answer with one embedding of the
    prompt, the mean of its tokens' hidden states behind the last norm or the last token's; ``sampling`` means nothing
    then.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    adapter_digest: str | None = None
    tenant: str = ""
    share: float | None = None
    api_token: str | None = field(default=None, repr=False)
    pooling: Pooling | None = None

    @property
    def draws(self) -> bool:
        """Whether any token is generated."""
        return self.pooling is None and self.sampling.max_tokens != 0

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (JSON types) that crosses process borders."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationRequest:
        """The inverse of ``to_dict``."""
        values = dict(data)
        sampling = dict(values.pop("sampling"))
        for name in ("stop", "stop_token_ids"):
            sampling[name] = tuple(sampling[name])
        sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling.get("logit_bias", ()))
        grammar = sampling.get("grammar")
        sampling["grammar"] = None if grammar is None else Grammar(**grammar)
        values["prompt_token_ids"] = tuple(values["prompt_token_ids"])
        return cls(sampling=SamplingParams(**sampling), **values)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Raw (before temperature) natural-log probability of one token and of the likeliest ones in its place.

    ``text`` is the token decoded alone; ``top`` holds ``(token_id, logprob, text)``, likeliest first.
    """

    token_id: int
    logprob: float
    text: str
    top: tuple[tuple[int, float, str], ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenLogprob:
        """From an entry of ``GenerationChunk.to_dict``."""
        top = tuple((token, value, text) for token, value, text in data["top"])
        return cls(data["token_id"], data["logprob"], data["text"], top)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went in its engine, in seconds, one after the other.

    adapter_s: until its adapter was at hand. queue_s: until its first step. prefill_s: until its first token was read.
    decode_s: until its last one was.
    """

    adapter_s: float
    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What a request produced since its last chunk. ``finish_reason`` is set on the last one only.

    ``text`` never holds part of a stop string, and ends in a broken character only where the completion does.
    Counts are totals so far. ``stop_reason`` is the stop string or stop token id that ended it, None for
    end-of-sequence or length. ``timings`` comes with the last chunk. ``prompt_logprobs``, where asked for, come with
    the first one, for every token of the prompt; None is the first token's, which follows nothing. ``embedding``, where
    asked for, is all that its one chunk brings: (hidden_size,), fp32 values, not normalised.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timings: Timings | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    embedding: tuple[float, ...] | None = None

    def __add__(self, later: GenerationChunk) -> GenerationChunk:
        """This chunk and a later one of the same request as one."""
        return GenerationChunk(
            self.request_id,
            self.text + later.text,
            self.token_ids + later.token_ids,
            later.prompt_tokens,
            later.completion_tokens,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.stop_reason,
            later.timings,
            self.prompt_logprobs + later.prompt_logprobs,
            self.embedding or later.embedding,
        )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (JSON types) that crosses process borders."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # asdict copies leaf by leaf
        for name in ("logprobs", "prompt_logprobs"):
            values[name] = [None if p is None else _plain(p) for p in values[name]]
        values["timings"] = None if self.timings is None else asdict(self.timings)
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationChunk:
        """The inverse of ``to_dict``."""
        values = dict(data)
        values["token_ids"] = tuple(values["token_ids"])
        for name in ("logprobs", "prompt_logprobs"):
            values[name] = tuple(None if p is None else TokenLogprob.from_dict(p) for p in values[name])
        if values["embedding"] is not None:
            values["embedding"] = tuple(values["embedding"])
        timings = values.get("timings")
        values["timings"] = None if timings is None else Timings(**timings)
        return cls(**values)


def _plain(token: TokenLogprob) -> dict[str, Any]:
    return {"token_id": token.token_id, "logprob": token.logprob, "text": token.text, "top": token.top}


def check_length(
    prompt_tokens: int, max_tokens: int | None, limit: int, param: str = "prompt", max_tokens_param: str = "max_tokens"
) -> int:
    """How many tokens, prompt and completion together, a request may come to in a context of ``limit`` tokens.

    ``max_tokens`` None fills the context, 0 is a prompt alone. ``param`` is what the client calls its prompt
    ("prompt", "messages"), ``max_tokens_param`` what it calls max_tokens.
    Raises InvalidRequest with the numbers for an empty prompt and for what does not fit.
    """
    if prompt_tokens == 0:
        raise InvalidRequest("the prompt has no tokens: send at least one", param)
    least = 0 if max_tokens == 0 else 1
    if prompt_tokens + least > limit:
        included = ", completion included" if least else ""
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens but the context is {limit} tokens{included}: "
            f"shorten it by {prompt_tokens - limit + least} or more",
            param,
            CONTEXT_LENGTH_EXCEEDED,
        )
    total = limit if max_tokens is None else prompt_tokens + max_tokens
    if total > limit:
        raise InvalidRequest(
            f"the prompt's {prompt_tokens} tokens and {max_tokens_param} {max_tokens} exceed the context of {limit} "
            f"tokens: lower {max_tokens_param} to {limit - prompt_tokens} or less",
            max_tokens_param,
            CONTEXT_LENGTH_EXCEEDED,
        )
    return total


# Types are checked as well: requests come from other processes, and a step is shared by everybody.


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and low <= value <= high


def _integer(value: object, low: int, high: int | None = None) -> bool:
    return isinstance(value, int) and low <= value and (high is None or value <= high)


def _tuple_of(kind: type, values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)
