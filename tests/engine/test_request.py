"""What a request may ask for: everything else is refused before it reaches a step that others share."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from engine.request import InvalidRequest, SamplingParams, check_length


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
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("stop", ("",)),
        ("stop", (5,)),
        ("stop", "text"),
        ("stop_token_ids", ("5",)),
        ("stop_token_ids", 5),
        ("logprobs", 21),
        ("logprobs", 2.5),
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
        {"temperature": 100.0, "top_p": 1e-9, "min_p": 1.0, "stop": ("a", "b"), "stop_token_ids": (0, 2**70)},
    ],
)
def test_the_largest_and_smallest_values_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values} == values


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
