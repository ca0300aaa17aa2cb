"""Retries, refusals and cancellation at the edge to Serve, against a scripted handle."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from adapter_store.errors import AdapterRefused
from deployments import wire
from deployments.fleet import Fleet
from deployments.observability.request_record import RequestRecord
from deployments.protocol.errors import ApiError, ReplicaLost
from engine.request import EngineDead, EngineOverloaded, GenerationChunk, GenerationRequest, InvalidRequest

REQUEST = GenerationRequest("r", (1, 2), adapter="local:/adapters/a", adapter_digest="d" * 64)
PIECE = GenerationChunk("r", "a", (1,), 2, 1)
LAST = GenerationChunk("r", "b", (2,), 2, 2, finish_reason="stop")


class Response:
    """Yields scripted items, raising those that are exceptions."""

    def __init__(self, items):
        self.items = list(items)
        self.stopped = asyncio.Event()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if item is None:
            await self.stopped.wait()
            raise asyncio.CancelledError  # as a response does that was cancelled
        if isinstance(item, BaseException):
            raise item
        return wire.encode_chunk(item) if isinstance(item, GenerationChunk) else item

    def cancel(self):
        self.stopped.set()

    @property
    def cancelled(self):
        return self.stopped.is_set()


class Handle:
    """A Serve handle that answers call after call from a script."""

    def __init__(self, *script):
        self.script = list(script)
        self.calls = []
        self.responses = []

    def options(self, **options):
        self.last_options = options
        return self

    def remote(self, request, whole, routing):
        self.calls.append((self.last_options.get("multiplexed_model_id"), routing["avoid"]))
        self.responses.append(Response(self.script.pop(0)))
        return self.responses[-1]


def refusal(error, replica="r1"):
    return wire.encode_error(error, replica)


async def collect(handle):
    return [chunk async for chunk in Fleet(handle).generate(REQUEST, "tenant", RequestRecord())]


async def test_a_stream_passes_through_and_names_the_adapter_to_the_router():
    handle = Handle([PIECE, LAST])
    assert await collect(handle) == [PIECE, LAST]
    assert handle.calls == [("d" * 64, ())]
    assert not handle.responses[0].cancelled


@pytest.mark.parametrize(
    "lost",
    [ActorDiedError(), ActorUnavailableError("gone", b"x" * 16), EngineDead("stopped"), asyncio.CancelledError()],
)
async def test_a_replica_lost_before_the_first_chunk_is_replaced_by_another(lost):
    handle = Handle([lost], [PIECE, LAST])
    assert await collect(handle) == [PIECE, LAST]
    assert len(handle.calls) == 2


async def test_a_third_lost_replica_is_the_end():
    handle = Handle(*[[ActorDiedError()]] * 5)
    with pytest.raises(ReplicaLost) as caught:
        await collect(handle)
    assert not caught.value.started and len(handle.calls) == 3


@pytest.mark.parametrize("end", [[ActorDiedError()], [], [GenerationChunk("r", "", (), 2, 1, finish_reason="abort")]])
async def test_a_stream_that_breaks_is_not_begun_again(end):
    handle = Handle([PIECE, *end], [PIECE, LAST])
    with pytest.raises(ReplicaLost) as caught:
        await collect(handle)
    assert caught.value.started and len(handle.calls) == 1


async def test_a_full_replica_is_avoided_in_the_next_try():
    full = EngineOverloaded("full")
    handle = Handle([refusal(full, "r1")], [refusal(full, "r2")], [LAST])
    assert await collect(handle) == [LAST]
    assert [avoid for _, avoid in handle.calls] == [(), ("r1",), ("r1", "r2")]
    only_one = Handle(*[[refusal(full)]] * 3)
    with pytest.raises(EngineOverloaded):
        await collect(only_one)
    assert len(only_one.calls) == 2  # asked again and met by the same replica: there is no other
    with pytest.raises(EngineOverloaded):
        await collect(Handle(*[[BackPressureError(1, 1)]] * 3))


async def test_a_replica_with_a_dead_engine_is_avoided():
    handle = Handle([refusal(EngineDead("stopped"), "r1")], [LAST])
    assert await collect(handle) == [LAST]
    assert handle.calls[1][1] == ("r1",)
    with pytest.raises(ReplicaLost) as caught:
        await collect(Handle([PIECE, refusal(EngineDead("stopped"))]))
    assert caught.value.started


async def test_a_request_that_breaks_engines_takes_down_two_at_most():
    dead = EngineDead("the step loop broke")
    handle = Handle([refusal(dead, "r1")], [refusal(dead, "r2")], [LAST])
    with pytest.raises(ReplicaLost, match="two") as caught:
        await collect(handle)
    assert not caught.value.started and isinstance(caught.value.__cause__, EngineDead)
    assert [avoid for _, avoid in handle.calls] == [(), ("r1",)]


@pytest.mark.parametrize("other", [[ActorDiedError()], [refusal(EngineOverloaded("full"), "r2")]])
async def test_other_losses_leave_a_broken_engine_its_one_retry(other):
    broken = [refusal(EngineDead("the step loop broke"), "r1")]
    for script in ([other, broken, [LAST]], [broken, other, [LAST]]):
        handle = Handle(*script)
        assert await collect(handle) == [LAST]
        assert len(handle.calls) == 3
    handle = Handle(broken, other, [refusal(EngineDead("the step loop broke"), "r3")], [LAST])
    with pytest.raises(ReplicaLost, match="two"):
        await collect(handle)
    assert len(handle.calls) == 3


async def test_refusals_are_told_at_once_under_the_clients_name():
    handle = Handle([refusal(AdapterRefused("local:/secret/path", "it uses DoRA"))])
    with pytest.raises(AdapterRefused) as caught:
        await collect(handle)
    assert caught.value.adapter == "tenant" and caught.value.reason == "it uses DoRA"
    with pytest.raises(InvalidRequest) as invalid:
        await collect(Handle([refusal(InvalidRequest("no", "prompt", "too_long"))]))
    assert (invalid.value.param, invalid.value.code) == ("prompt", "too_long")


async def test_leaving_early_cancels_the_replica():
    handle = Handle([PIECE, None])
    chunks = Fleet(handle).generate(REQUEST, "tenant", RequestRecord())
    assert await anext(chunks) == PIECE
    await chunks.aclose()
    assert handle.responses[0].cancelled


async def test_a_cancelled_caller_cancels_the_replica_and_is_not_retried():
    handle = Handle([None], [LAST])
    task = asyncio.create_task(collect(handle))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.responses[0].cancelled and len(handle.calls) == 1


@pytest.mark.parametrize("begun", [[], [PIECE]])
async def test_what_is_under_way_when_the_gateway_has_to_go_is_told_so_and_not_tried_again(begun):
    handle = Handle([*begun, None], [LAST])
    fleet = Fleet(handle)
    chunks = fleet.generate(REQUEST, "tenant", RequestRecord())
    for piece in begun:
        assert await anext(chunks) == piece
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0.01)
    fleet.stop()
    with pytest.raises(ApiError) as caught:
        await waiting
    assert (caught.value.status, caught.value.code) == (503, "server_stopping")
    assert caught.value.headers["Retry-After"]
    assert len(handle.calls) == 1
    fleet.stop()  # nothing is left to stop
    assert [chunk async for chunk in fleet.generate(REQUEST, "tenant", RequestRecord())] == [LAST]
