"""Limits, over HTTP and under concurrency: nothing over one is let in, nothing under one refused."""

from __future__ import annotations

import asyncio

import pytest

from deployments.protocol.errors import ApiError
from deployments.tenants import admission, register
from deployments.tenants.admission import Admissions
from deployments.tenants.caller import Caller
from deployments.tenants.tenant import Limits, Tenant
from tests.deployments.test_adapters import eventually

from .conftest import PROMPT, LocalRegister


def caller(**limits: int) -> Caller:
    return Caller(Tenant("acme", limits=Limits(**limits)), "tenant")


def desk(shared: LocalRegister) -> Admissions:
    async def find() -> LocalRegister:
        if shared.dead:
            raise ValueError("there is no actor")
        return shared

    return Admissions(find)


async def outcome(coroutine) -> int:
    try:
        await coroutine
    except ApiError as error:
        return error.status
    return 200


async def test_two_gateways_together_let_in_just_as_many_as_the_limit_says():
    shared = LocalRegister()
    gateways = [desk(shared), desk(shared)]
    asked = [outcome(gateways[number % 2].enter(caller(requests_per_minute=37))) for number in range(100)]
    statuses = await asyncio.gather(*asked)
    assert (statuses.count(200), statuses.count(429)) == (37, 63)
    for one in gateways:
        await one.close()


async def test_concurrency_is_never_exceeded_and_a_place_that_is_free_is_given():
    shared = LocalRegister()
    gateways = [desk(shared), desk(shared)]
    running = most = refused = 0

    async def client(number: int) -> None:
        nonlocal running, most, refused
        for _ in range(20):
            try:
                admitted = await gateways[number % 2].enter(caller(concurrency=3))
            except ApiError as error:
                assert error.status == 429 and error.kind == "concurrency"
                assert running == 3, "refused only while all places are taken"
                refused += 1
                await asyncio.sleep(0)
                continue
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            admitted.leave(0)

    await asyncio.gather(*map(client, range(8)))
    assert most == 3 and refused
    for one in gateways:
        await one.close()


async def test_a_tenant_is_told_what_is_left_and_when_to_come_again(door):
    for left in (4, 3):
        answered = await door.complete("limited", "shout")
        assert answered.status_code == 200
        used = answered.json()["usage"]["total_tokens"]
        assert answered.headers["x-ratelimit-limit-requests"] == "5"
        assert answered.headers["x-ratelimit-remaining-requests"] == str(left)
        assert answered.headers["x-ratelimit-limit-tokens"] == "400"
        assert 0 < float(answered.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    streamed = await door.complete("limited", "shout", stream=True)
    assert streamed.headers["x-ratelimit-remaining-requests"] == "2"
    assert int(streamed.headers["x-ratelimit-remaining-tokens"]) == 400 - 3 * used, "settled by what was used"
    hidden = await door.complete("limited", "json")
    assert hidden.status_code == 404 and hidden.headers["x-ratelimit-remaining-requests"] == "1"
    assert (await door.complete("limited", "shout")).status_code == 200
    over = await door.complete("limited", "shout")
    error = over.json()["error"]
    assert (over.status_code, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
    assert 0 < int(over.headers["retry-after"]) <= 60 and over.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await door.complete("acme", "shout")).headers.get("x-ratelimit-limit-requests") is None
    assert (await door.get("/v1/models", "limited")).status_code == 200, "a list is not a request for tokens"


async def test_tokens_are_set_aside_first_and_settled_at_the_end(door):
    door.tenants["limited"] = {"adapters": ["shout"], "tokens_per_minute": 200}
    door.write()
    door.keys.look()
    never = await door.complete("limited", "shout", max_tokens=200)
    assert (never.status_code, never.json()["error"]["code"]) == (400, "tokens_limit_exceeded")
    both = await asyncio.gather(*(door.complete("limited", "shout", max_tokens=100) for _ in range(2)))
    assert sorted(one.status_code for one in both) == [200, 429], "each might use over half of it"
    refused = next(one for one in both if one.status_code == 429)
    assert refused.json()["error"]["type"] == "tokens" and int(refused.headers["retry-after"]) > 0
    again = await door.complete("limited", "shout", max_tokens=100)
    assert again.status_code == 200, "the first has ended with fewer"


@pytest.mark.parametrize("how", ["ends", "fails", "stream", "client leaves", "client leaves a stream"])
async def test_a_place_is_given_back_however_a_request_ends(door, engine, how):
    door.tenants["limited"] = {"adapters": ["shout", "hub:acme/*"], "concurrency": 1}
    door.write()
    door.keys.look()
    long = {"max_tokens": 400, "ignore_eos": True}
    if how == "ends":
        assert (await door.complete("limited", "shout")).status_code == 200
    elif how == "fails":
        assert (await door.complete("limited", "shout", max_tokens=10**6)).status_code == 400
        assert (await door.complete("limited", "json")).status_code == 404
        assert (await door.complete("limited", "hub:acme/nowhere")).status_code == 503
    elif how == "stream":
        assert (await door.complete("limited", "shout", stream=True)).status_code == 200
    else:
        task = asyncio.create_task(door.complete("limited", "shout", stream="stream" in how, **long))
        await eventually(lambda: engine.stats().running)
        assert (await door.complete("limited", "shout")).status_code == 429
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (await door.complete("limited", "shout")).status_code == 200


async def test_without_limits_nobody_is_asked(door):
    await door.complete("acme", "shout")
    assert door.register.calls == []


async def test_a_register_that_died_is_told_by_the_gateways_what_it_let_in(monkeypatch):
    monkeypatch.setattr(register, "RECALL_SECONDS", 0.3)
    monkeypatch.setattr(admission, "CONFIRM_SECONDS", 0.05)
    monkeypatch.setattr(admission, "RETRY_SECONDS", 0.01)
    shared = LocalRegister()
    gateways = [desk(shared), desk(shared)]
    limited = {"requests_per_minute": 10, "concurrency": 5}
    admitted = [await gateways[number % 2].enter(caller(**limited)) for number in range(4)]
    shared.dead = True
    waiting = [asyncio.create_task(outcome(gateways[0].enter(caller(**limited)))) for _ in range(3)]
    await asyncio.sleep(0.1)
    admitted.pop().leave(0)  # nobody hears of it
    shared.register = register.TenantRegister(anew=True)
    shared.dead = False
    statuses = await asyncio.gather(*waiting)
    assert sorted(statuses) == [200, 200, 429], "three run still, so two places are left: requests wait, none fails"
    ledger = shared.register._ledger
    assert len(ledger._accounts["acme"].entered) == 6
    for one in gateways:
        await one.close()


async def test_while_limits_cannot_be_counted_nobody_who_has_some_comes_in(monkeypatch):
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(admission, "RETRY_SECONDS", 0.01)
    shared = LocalRegister()
    shared.dead = True
    gateway = desk(shared)
    with pytest.raises(ApiError, match="cannot count") as raised:
        await gateway.enter(caller(concurrency=1))
    assert raised.value.status == 503 and raised.value.headers["Retry-After"]
    assert await outcome(gateway.enter(Caller(Tenant("free"), "tenant"))) == 200
    await gateway.close()
    unset = Admissions()
    with pytest.raises(ApiError, match="cannot count"):
        await unset.enter(caller(concurrency=1))
    await unset.close()


async def test_several_prompts_and_samples_count_as_what_they_may_use(door):
    door.tenants["limited"] = {"adapters": ["shout"], "tokens_per_minute": 1000}
    door.write()
    door.keys.look()
    prompt = [PROMPT] * 2
    answered = await door.complete("limited", "shout", prompt=prompt, n=3, max_tokens=2)
    one = (await door.complete("admin", "shout", max_tokens=2)).json()["usage"]["prompt_tokens"]
    assert int(answered.headers["x-ratelimit-remaining-tokens"]) == 1000 - (2 * one + 6 * 2)
