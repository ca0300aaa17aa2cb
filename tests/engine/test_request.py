"""What a request may ask for: everything else is refused before it reaches a step that others share."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from engine.request import GenerationRequest, Grammar, InvalidRequest, SamplingParams, check_length


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 2**63),  # no device's integer holds it
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", None),
        ("min_p", 1.1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("max_tokens", -1),
        ("max_tokens", 2.0),
        ("stop", ("",)),
        ("stop", (5,)),
        ("stop", "text"),
        ("stop_token_ids", ("5",)),
        ("stop_token_ids", 5),
        ("logprobs", 21),
        ("logprobs", 2.5),
        ("presence_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", 10.5),
        ("min_tokens", -1),
        ("min_tokens", "1"),
        ("grammar", "json_object"),
    ],
)
def test_a_parameter_out_of_range_or_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} is .* but must be ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0, "top_p": 1, "min_p": 0},  # JSON has one kind of number
        {"top_k": 2**63 - 1, "seed": 2**63 - 1, "max_tokens": 2**70, "logprobs": 20},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 10, "min_tokens": 4, "max_tokens": 4},
        {"logit_bias": ((0, -100), (2**40, 100.0)), "grammar": Grammar("json_schema", "{}")},
        {"temperature": 100.0, "top_p": 1e-9, "min_p": 1.0, "stop": ("a", "b"), "stop_token_ids": (0, 2**70)},
    ],
)
def test_the_largest_and_smallest_values_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values} == values


@pytest.mark.parametrize(
    "biases",
    [
        ((1, 100.5),),
        ((-1, 0),),
        (("1", 0),),
        ((1.0, 0),),
        ((1, 2, 3),),
        [(1, 2)],
        ((1, 2), (1, 3)),
        tuple((i, 1) for i in range(1025)),
    ],
)
def test_a_bias_that_no_token_can_have_is_refused(biases: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^logit_bias") as caught:
        SamplingParams(logit_bias=biases)
    assert caught.value.param == "logit_bias"
    assert len(str(caught.value)) < 200


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^min_tokens is 5 but must be an integer between 0 and max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize("values", [("xml", ""), ("regex", None), (None, "")])
def test_a_grammar_of_no_known_kind_is_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Grammar(*values)
    assert caught.value.param == "grammar"


def test_a_request_crosses_processes_as_json() -> None:
    params = SamplingParams(
        logit_bias=((5, -1.5), (7, 100.0)), grammar=Grammar("choice", '["a"]'), stop=("x",), stop_token_ids=(3,)
    )
    for sampling in (SamplingParams(), params):
        request = GenerationRequest("one", (1, 2), sampling)
        assert GenerationRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize(
    ("lengths", "param", "code"),
    [
        ((0, 1, 10), "messages", None),
        ((10, None, 10), "messages", "context_length_exceeded"),
        ((9, 2, 10), "max_completion_tokens", "context_length_exceeded"),
    ],
)
def test_a_length_that_does_not_fit_names_what_the_client_sent(
    lengths: tuple[int, int | None, int], param: str, code: str | None
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_length(*lengths, "messages", "max_completion_tokens")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.param, again.code, str(again)) == (param, code, str(caught.value))
    if param.startswith("max"):
        assert "lower max_completion_tokens to 1 or less" in str(again)


def test_lengths_that_fit() -> None:
    assert check_length(9, 1, 10) == check_length(9, None, 10) == 10
