"""What completions and chat have in common: sampling fields, choices, usage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from deployments.protocol.errors import ApiError, from_validation, invalid, unsupported
from deployments.protocol.structured import StructuredFields, WantedGrammar
from engine.request import MOST_BIASES, SamplingParams, TokenLogprob

# Fields that would change the result and that we do not have, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "logits_processors": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
}


def in_range(low: float, high: float | None = None) -> Callable[[dict[str, Any]], None]:
    """For the OpenAPI document alone: the engine's parameters say what is out of range."""

    def put(schema: dict[str, Any]) -> None:
        number = next(one for one in schema["anyOf"] if one["type"] != "null")
        number |= {"minimum": low} if high is None else {"minimum": low, "maximum": high}

    return put


# Stops are looked for at every token of every row, in the step loop that all tenants share.
_MAX_STOPS = 16
_MAX_STOP_TOKENS = 1024


_StopText = Annotated[str, Field(min_length=1)]
_Stops = _StopText | Annotated[list[_StopText], Field(max_length=_MAX_STOPS)] | None


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) <= _MAX_STOPS and all(isinstance(item, str) for item in value):
        return value
    raise PydanticCustomError("stop", "must be a string or a list of at most {most} strings", {"most": _MAX_STOPS})


def _logit_bias(value: Any) -> Any:
    """Keys of JSON objects are text."""
    if value is None:
        return value
    if isinstance(value, dict) and len(value) <= MOST_BIASES and all(map(_is_token_id, value)):
        return {str(key): bias for key, bias in value.items()}
    raise PydanticCustomError(
        "logit_bias", "must be an object of at most {most} token ids, each with its bias", {"most": MOST_BIASES}
    )


def _is_token_id(key: Any) -> bool:
    text = str(key)
    return text.isascii() and text.isdecimal() and len(text) < 19


LogitBias = Annotated[
    dict[str, float] | None,
    BeforeValidator(_logit_bias),
    Field(description="Token id to what its logit gets, -100 to 100."),
]


class StreamOptions(BaseModel):
    """``include_usage``: one more event at the end, with the token counts."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class GenerationBody(StructuredFields):
    """Fields of both endpoints. Fields that we do not know are ignored, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="ignore")
    unsupported_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED

    model: str = Field(max_length=1024, description="The base model's name or an adapter's: see GET /v1/models.")
    n: int | None = Field(None, ge=1, description="Completions for each prompt.")
    max_tokens: int | None = Field(None, json_schema_extra=in_range(1))
    temperature: float | None = Field(
        None, description="0 is greedy; 1 when left out.", json_schema_extra=in_range(0, 100)
    )
    top_p: float | None = Field(None, json_schema_extra=in_range(0.0001, 1))
    top_k: int | None = Field(None, description="0 or -1 keeps every token.", json_schema_extra=in_range(-1))
    min_p: float | None = Field(None, json_schema_extra=in_range(0, 1))
    seed: int | None = Field(None, json_schema_extra=in_range(0, 2**63 - 1))
    stop: Annotated[str | list[str] | None, BeforeValidator(_stop, json_schema_input_type=_Stops)] = None
    stop_token_ids: list[int] | None = Field(None, max_length=_MAX_STOP_TOKENS)
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(
        None,
        description="Log probabilities of the prompt's tokens and of that many likeliest ones; not in a stream.",
        json_schema_extra=in_range(0, 20),
    )
    logit_bias: LogitBias = None
    presence_penalty: float | None = Field(None, json_schema_extra=in_range(-2, 2))
    frequency_penalty: float | None = Field(None, json_schema_extra=in_range(-2, 2))
    repetition_penalty: float | None = Field(
        None, description="1 changes nothing.", json_schema_extra=in_range(0.0001, 10)
    )
    min_tokens: int | None = Field(None, json_schema_extra=in_range(0))
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, harmless in cls.unsupported_fields.items():
                value = data.get(name)
                if value is not None and value not in harmless:
                    raise unsupported(name, f"{name} is not supported by this server: leave it out")
        return data

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options is only allowed together with stream=true")
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> GenerationBody:
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs", "prompt_logprobs are not possible with stream=true: send one of them")
        return self

    @property
    def candidates(self) -> int:
        """Completions to make of each prompt."""
        return self.n or 1

    @property
    def max_tokens_field(self) -> str:
        """What the client calls the completion's limit."""
        return "max_tokens"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def wanted(self) -> WantedGrammar | None:
        """What the completion must be, and the field that says so."""
        return self.wanted_grammar()

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's parameters. Raises InvalidRequest naming the field that is out of range."""
        wanted = self.wanted()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_k=0 if self.top_k is None or self.top_k == -1 else self.top_k,
            top_p=1.0 if self.top_p is None else float(self.top_p),
            min_p=0.0 if self.min_p is None else float(self.min_p),
            seed=self.seed,
            max_tokens=max_tokens,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            grammar=None if wanted is None else wanted.grammar,
        )


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's ``usage`` object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def prompt_logprobs_list(told: Sequence[TokenLogprob | None], top: int) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token of the prompt an object from token ids to what is known of them, for
    the token itself and the ``top`` likeliest in its place; null for the first. rank: from 1, null where it is not
    among those."""

    def entries(token: TokenLogprob) -> dict[str, Any]:
        made = {token.token_id: {"logprob": token.logprob, "rank": None, "decoded_token": token.text}}
        for rank, (token_id, logprob, text) in enumerate(token.top[:top], 1):
            made[token_id] = {"logprob": logprob, "rank": rank, "decoded_token": text}
        return {str(token_id): entry for token_id, entry in made.items()}

    return [None if token is None else entries(token) for token in told]


def read_body(model: type[BaseModel], payload: Any) -> Any:
    """Validate a plain dict outside HTTP. Raises ApiError as the HTTP endpoints do."""
    if not isinstance(payload, dict):
        raise ApiError(400, f"the request is a {type(payload).__name__}: send a dict")
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        raise from_validation(error.errors()) from None
