"""Requests that have their logits changed, and what they must draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.engine import Engine
from engine.request import GenerationRequest, SamplingParams
from tests.engine.engines import ask
from tests.engine.oracle import TinyModel

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
PROMPT = "the cat sleeps in the old garden and "
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def say(engine: Engine, name: str, **sampling: Any) -> GenerationRequest:
    prompt = tuple(engine.tokenizer.encode(PROMPT))
    return GenerationRequest(name, prompt, SamplingParams(**{"max_tokens": 24, **sampling}))


def changed(**sampling: Any) -> list[dict[str, Any]]:
    """One of each kind of change."""
    return [
        {"repetition_penalty": 1.8, **sampling},
        {"frequency_penalty": 1.5, "presence_penalty": -0.5, **sampling},
        {"logit_bias": ((5, 3.0), (9, -100.0)), **sampling},
        {"min_tokens": 6, "ignore_eos": False, **sampling},
        {"presence_penalty": 2.0, "logit_bias": ((7, 6.0),), "temperature": 0.0},
    ]


def greedy_with(model: TinyModel, request: GenerationRequest, params: SamplingParams) -> tuple[int, ...]:
    """What a request draws with ``params``: by transformers' own logits and the formulas of OpenAI and CTRL."""
    prompt = request.prompt_token_ids
    tokens = list(prompt)
    for _ in range(request.sampling.max_tokens or 1):
        logits = model.logits(tokens, None)[-1].double()
        seen, generated = set(tokens), tokens[len(prompt) :]
        for token in seen:
            value = logits[token]
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        for token in set(generated):
            logits[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
        for token, bias in params.logit_bias:
            logits[token] += bias
        tokens.append(int(logits.argmax()))
    return tuple(tokens[len(prompt) :])


def penalised_requests() -> list[GenerationRequest]:
    """Greedy requests of 14 tokens with penalties and biases, alone and together; the last has none."""
    prompts = [[5, 9, 9, *range(60, 140), 5], [20] * 9, list(range(40, 60)), [7], [100, 3]]
    kinds = [
        {"repetition_penalty": 0.1},
        {"frequency_penalty": -1.5, "presence_penalty": -0.25},
        {"logit_bias": ((5, 4.0), (9, -100.0), (210, 4.0))},
        {"repetition_penalty": 5.0, "frequency_penalty": 0.9, "presence_penalty": 1.1, "logit_bias": ((8, 1.5),)},
        {},
    ]
    return [
        ask(str(index), prompt, new=14, **kind) for index, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]
