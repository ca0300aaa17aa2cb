"""A request's name: in every answer, the client's where it is safe, and in what is logged."""

from __future__ import annotations

import pytest

from .conftest import BASE_MODEL

BODY = {"model": BASE_MODEL, "prompt": "robot, old, eats, school", "max_tokens": 1}


async def test_the_clients_id_is_in_every_answer(http):
    headers = {"x-request-id": "trace-1:a/b"}
    answers = [
        await http.get("/health", headers=headers),
        await http.get("/v1/nothing", headers=headers),
        await http.delete("/v1/models", headers=headers),
        await http.post("/v1/completions", json={}, headers=headers),
        await http.post("/v1/completions", json=BODY, headers=headers),
        await http.post("/v1/completions", json=BODY | {"stream": True}, headers=headers),
        await http.post("/v1/completions", content=b" " * 2**17, headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 405, 400, 200, 200, 413]
    assert [answer.headers.get_list("x-request-id") for answer in answers] == [["trace-1:a/b"]] * 7


@pytest.mark.parametrize("sent", [None, "", "a" * 129, "a b", "a\tb", 'a"b', "é"])
async def test_an_id_that_is_missing_or_unsafe_is_replaced(http, sent):
    headers = {} if sent is None else {"x-request-id": sent.encode("latin-1")}
    first, second = [(await http.get("/health", headers=headers)).headers["x-request-id"] for _ in range(2)]
    assert first != second and first.isalnum() and len(first) == 32


async def test_what_fails_inside_is_logged_and_answered_under_its_id(http, service, monkeypatch, caplog):
    async def breaks(*_, **__):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(service, "models", breaks)
    monkeypatch.setattr(service, "start", breaks)
    for answer in (
        await http.get("/v1/models", headers={"x-request-id": "mine"}),
        await http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"}),
    ):
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
        assert "secret" not in answer.text
    assert [record.getMessage() for record in caplog.records if "failed" in record.getMessage()] == [
        "request mine failed"
    ] * 2
