"""``POST /v1/embeddings``: what comes in and what goes out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.protocol.common import usage
from deployments.protocol.errors import unsupported
from deployments.protocol.prompts import Prompts, each_prompt
from engine.request import Pooling

_UNSUPPORTED = ("truncate_prompt_tokens", "messages", "prompt_embeds")  # of vLLM's, which would change the result


class EmbeddingBody(BaseModel):
    """The request body: OpenAI's, and ``pooling`` and ``normalize``. Fields that we do not know are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str = Field(max_length=1024, description="The base model's name or an adapter's: see GET /v1/models.")
    input: Prompts = Field(description="Text or token ids, or a list of either: one embedding each.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of little-endian fp32.")
    dimensions: int | None = Field(None, description="The model's hidden size, if anything: nothing is cut off.")
    user: str | None = None
    pooling: Pooling | None = Field(None, description="Of the last hidden states: mean of all tokens' (default), last.")
    normalize: bool | None = Field(None, description="Scale to length 1; true when left out.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in _UNSUPPORTED:
                if data.get(name) is not None:
                    raise unsupported(name, f"{name} is not supported by this server: leave it out")
        return data

    def check_dimensions(self, hidden_size: int) -> None:
        """Raises ApiError for another number of dimensions than the model has."""
        if self.dimensions not in (None, hidden_size):
            raise unsupported(
                "dimensions",
                f"dimensions is {self.dimensions} but this model's embeddings have {hidden_size}, and a part of them "
                "means nothing: leave it out",
            )

    def inputs(self) -> list[str | list[int]]:
        """One entry an embedding, as text or as token ids."""
        return each_prompt(self.input)


def embedding_list(body: EmbeddingBody, vectors: Sequence[Sequence[float]], prompt_tokens: int) -> dict[str, Any]:
    """OpenAI's answer. vectors: as the engine made them."""
    data = [
        {"object": "embedding", "index": index, "embedding": _written(body, vector)}
        for index, vector in enumerate(vectors)
    ]
    counted = usage(prompt_tokens, 0)
    del counted["completion_tokens"]
    return {"object": "list", "data": data, "model": body.model, "usage": counted}


def _written(body: EmbeddingBody, vector: Sequence[float]) -> list[float] | str:
    values = np.array(vector, dtype=np.float64)
    length = float(np.linalg.norm(values))
    if body.normalize is not False and length > 0.0:
        values /= length
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return values.astype(np.float32).tolist()
