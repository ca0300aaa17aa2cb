"""LoRAX's endpoints: what comes in, as a completion of ours, and which errors its clients know."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapter_store.merging_recipe import Merge, MergePart, SignMethod, Strategy
from adapter_store.source import AdapterRef
from deployments.protocol.bounds import schema_text
from deployments.protocol.common import _MAX_STOPS, read_body
from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import ApiError, invalid, unsupported
from deployments.protocol.structured import Schema, WantedGrammar
from engine.request import Grammar, SamplingParams

BASE_MODEL_IDS = ("", "__base_model__")
MOST_ALTERNATIVES = 20
_STRICT = ConfigDict(strict=True, extra="ignore")
# Fields that would change the result and that we do not have, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "watermark": (False,),
    "apply_chat_template": (False,),
    "adapter_parameters": (),
}


class MergedAdapters(BaseModel):
    """Adapters merged into one, see ``merging_recipe.Merge``. seed is ours."""

    model_config = _STRICT

    ids: list[str] = Field(min_length=1)
    weights: list[float] = Field(min_length=1)
    merge_strategy: Strategy | None = Field(None, description="linear when left out.")
    density: float = Field(0.0, description="Share of values that is kept, above 0 and at most 1; not for linear.")
    majority_sign_method: SignMethod | None = Field(None, description="total when left out; of ties and dare_ties.")
    seed: int = Field(0, description="Of what dare_linear and dare_ties drop.")

    @model_validator(mode="after")
    def _check(self) -> MergedAdapters:
        if len(self.ids) != len(self.weights):
            raise invalid(
                "parameters.merged_adapters.weights",
                f"merged_adapters has {len(self.ids)} ids but {len(self.weights)} weights",
            )
        self.merge(lambda adapter_id: adapter_id)
        return self

    def merge(self, called: Callable[[str], str]) -> Merge:
        """The merge of the adapters that ``called`` names for their ids. Raises ApiError."""
        parts = zip(self.ids, self.weights, strict=True)
        try:
            return Merge(
                tuple(MergePart(called(adapter_id), weight) for adapter_id, weight in parts),
                self.merge_strategy or "linear",
                self.density,
                self.majority_sign_method or "total",
                self.seed,
            )
        except ValueError as error:
            raise invalid("parameters.merged_adapters", f"merged_adapters: {error}") from error


class LoraxFormat(BaseModel):
    """What the text must be."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    schema_: Schema = Field(None, alias="schema")

    def grammar(self) -> Grammar | None:
        """None for text."""
        if self.type == "text":
            return None
        return Grammar("json_object") if self.schema_ is None else Grammar("json_schema", schema_text(self.schema_))


class Parameters(BaseModel):
    """LoRAX's, with its defaults. Fields that it does not know either are ignored."""

    model_config = _STRICT

    adapter_id: str | None = Field(None, max_length=1024, description="The base model's when left out or empty.")
    adapter_source: str | None = Field(None, max_length=64, description="hub, local, s3 or another scheme of ours.")
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = Field(None, repr=False, description="Shows a private adapter to who may read it.")
    best_of: int | None = Field(None, ge=1, description="Answer with the likeliest of so many.")
    temperature: float | None = Field(None, description="0 is greedy.")
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = None
    typical_p: float | None = Field(None, description="Not supported: 1 or left out.")
    do_sample: bool = False
    max_new_tokens: int | None = Field(None, ge=1, description="Fills the context when left out.")
    ignore_eos_token: bool = False
    return_full_text: bool | None = Field(None, description="Put the prompt before the text.")
    stop: list[str] | None = Field(None, max_length=_MAX_STOPS, description="The text ends with the first of these.")
    truncate: int | None = Field(None, ge=1, description="Keep so many tokens of the prompt, its last ones.")
    watermark: bool = Field(False, description="Not supported.")
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = Field(None, ge=1, le=MOST_ALTERNATIVES)
    seed: int | None = Field(None, ge=0)
    response_format: LoraxFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, harmless in _UNSUPPORTED.items():
                if data.get(name) is not None and data[name] not in harmless:
                    raise unsupported(f"parameters.{name}", f"{name} is not supported by this server: leave it out")
        return data

    @model_validator(mode="after")
    def _check(self) -> Parameters:
        if self.adapter_id and self.merged_adapters is not None:
            raise invalid("parameters.adapter_id", "adapter_id and merged_adapters exclude each other: send one")
        if self.adapter_source == "pbase":
            raise unsupported(
                "parameters.adapter_source", "Predibase's registry is not read: download the adapter, or use hub or s3"
            )
        if (self.best_of or 1) > 1 and self.seed is not None:
            raise invalid("parameters.seed", "seed and best_of above 1 exclude each other")
        if (self.best_of or 1) > 1 and not self.samples:
            raise invalid("parameters.best_of", "best_of above 1 needs sampling: all completions would be the same")
        return self

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn and not the likeliest taken: LoRAX's rule."""
        wanted = self.do_sample or self.top_k is not None or (self.top_p or 1.0) < 1.0
        return self.temperature != 0 and (wanted or self.temperature not in {None, 1.0})

    def names_of(self, adapter_id: str) -> tuple[str, ...]:
        """What an adapter may be called here, the operator's own name for it first."""
        if AdapterRef.is_meant(adapter_id):
            return (adapter_id,)
        source = self.adapter_source or ("hub" if "/" in adapter_id else "local")
        return adapter_id, f"{source}:{adapter_id}" if source in {"hub", "local"} else f"{source}://{adapter_id}"


class GenerateBody(BaseModel):
    """``POST /generate`` and ``POST /generate_stream``."""

    model_config = _STRICT

    inputs: str = Field(min_length=1)
    parameters: Parameters = Field(default_factory=lambda: Parameters.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        """lorax-client says null where it has no parameters."""
        if isinstance(data, dict) and data.get("parameters", ...) is None:
            return {name: value for name, value in data.items() if name != "parameters"}
        return data

    def completion(self, model: str, prompt: list[int], *, stream: bool) -> LoraxCompletion:
        """The same as a completion of ours. prompt: tokens of ``inputs``. Raises ApiError, InvalidRequest."""
        asked = self.parameters
        if stream and (asked.best_of or 1) > 1:
            raise invalid("parameters.best_of", "best_of above 1 is not possible in a stream: send 1 or use /generate")
        if stream and asked.decoder_input_details:
            raise invalid("parameters.decoder_input_details", "decoder_input_details comes with /generate only")
        temperature = (1.0 if asked.temperature is None else asked.temperature) if asked.samples else 0.0
        values = {
            "model": model,
            "prompt": prompt,
            "n": asked.best_of,
            "max_tokens": asked.max_new_tokens,
            "temperature": temperature,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "seed": random.getrandbits(62) if asked.samples and asked.seed is None else asked.seed,
            "stop": asked.stop,
            "ignore_eos": asked.ignore_eos_token,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "repetition_penalty": asked.repetition_penalty,
            "logprobs": asked.return_k_alternatives or 0,
            "stream": stream,
            "asked": asked,
        }
        return read_body(LoraxCompletion, values)


class CompatBody(GenerateBody):
    """``POST /``."""

    stream: bool = False


class LoraxCompletion(CompletionBody):
    """A completion as LoRAX's clients ask for it."""

    model: str  # also a merge, which is as long as the names in it
    asked: Parameters

    @property
    def max_tokens_field(self) -> str:
        """See ``GenerationBody``."""
        return "max_new_tokens"

    def wanted(self) -> WantedGrammar | None:
        """See ``GenerationBody``."""
        grammar = self.asked.response_format and self.asked.response_format.grammar()
        return WantedGrammar("parameters.response_format", grammar) if grammar else None

    def sampling_params(self) -> SamplingParams:
        """See ``GenerationBody``. No more tokens than asked for, and no fewer than fit."""
        params = self.sampling(max_tokens=self.max_tokens, logprobs=self.logprobs)
        return replace(params, prompt_logprobs=0) if self.asked.decoder_input_details else params


#: Our errors as LoRAX says them: the first row that fits. (our codes, our statuses, LoRAX's status, its error_type)
_ERRORS: tuple[tuple[set[str | None], set[int], int, str], ...] = (
    ({"model_not_found", "adapter_refused", "generation_failed"}, set(), 424, "generation"),
    (set(), {429, 503}, 429, "overloaded"),
    (set(), {400, 413, 415, 422}, 422, "validation"),
    (set(), {500}, 500, "incomplete_generation"),
)
_BEFORE = {"validation": "Input validation error: ", "generation": "Request failed during generation: "}


def lorax_error(error: ApiError) -> tuple[int, dict[str, str]]:
    """HTTP status and body. What LoRAX has no word for (a key that is wrong) keeps its status."""
    for codes, statuses, status, kind in _ERRORS:
        if error.code in codes or error.status in statuses:
            return status, {"error": _BEFORE.get(kind, "") + error.message, "error_type": kind}
    return error.status, {"error": error.message, "error_type": error.code or "refused"}
