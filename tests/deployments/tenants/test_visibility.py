"""A tenant learns nothing of what it may not use, whatever it asks and however often."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import replace

import pytest

from adapter_store.source import AdapterRef
from deployments.tenants.caller import Caller, operator
from deployments.tenants.tenant import Tenant
from tests.deployments.conftest import BASE_MODEL, DEMO, STORE

from .conftest import PROMPT, Door


async def asked(door: Door, who: str, model: str, **headers: str):
    """All that an answer says, without what is another for every request."""
    answers = [
        await door.complete(who, model, headers=headers),
        await door.complete(who, model, stream=True, headers=headers),
        await door.http.post(
            "/v1/chat/completions",
            json={"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2},
            headers={"authorization": f"Bearer {who}"} | headers,
        )
        if who.startswith("lf-")
        else await door.complete(who, model, user="globex", headers=headers),
        await door.get(f"/v1/models/{model}", who, **headers),
    ]
    return [
        (one.status_code, one.text.replace(model, "MODEL"), sorted(name for name in one.headers if name != "date"))
        for one in answers
    ]


async def test_what_others_have_answers_as_what_is_not_there(door):
    await door.complete("globex", "json")  # resident now
    nothing = await asked(door, "acme", "jsoX")
    assert [status for status, _, _ in nothing] == [404] * 4
    assert "globex" not in str(nothing) and "json" not in str(nothing) and "did you mean" not in str(nothing)
    for hidden in ("json", "mirror", "spanish", "globex", "local:" + str(DEMO / "adapters" / "json"), "hub:globex/x"):
        assert await asked(door, "acme", hidden) == nothing, hidden
    # What would be its own and is not there answers the same; so does the base model where it may not be used.
    assert await asked(door, "acme", "acme-nothing") == nothing
    assert await asked(door, "globex", BASE_MODEL) == nothing
    assert await asked(door, "globex", "shout") == nothing


async def test_what_is_not_its_own_is_not_looked_for(door, monkeypatch):
    looked = []
    for method in ("named", "names", "resolve", "resolve_ref", "recall", "find"):
        real = getattr(door.directory.catalog, method)
        monkeypatch.setattr(
            door.directory.catalog, method, lambda *args, real=real, method=method: looked.append(method) or real(*args)
        )
    for hidden in ("json", "nothing-of-the-kind", "hub:globex/x", "local:" + str(DEMO / "adapters" / "json")):
        assert (await door.complete("acme", hidden)).status_code == 404
    assert looked == []
    assert (await door.complete("acme", "shout")).status_code == 200 and looked


async def test_how_long_it_takes_does_not_tell_what_is_there(door):
    """Both are the same code; a difference of a factor would be a look-up. Interleaved, so that load falls on both."""
    times: dict[str, list[float]] = {"json": [], "jsoX": []}
    for turn in range(30):
        for model in sorted(times, reverse=turn % 2 == 0):
            started = time.perf_counter()
            await door.get(f"/v1/models/{model}", "acme")
            times[model].append(time.perf_counter() - started)
    there, missing = map(min, times.values())
    assert there < 2 * missing and missing < 2 * there


async def test_a_list_holds_only_what_may_be_used(door):
    async def listed(who):
        return [one["id"] for one in (await door.get("/v1/models", who)).json()["data"]]

    assert await listed("acme") == [BASE_MODEL, "shout"]
    assert await listed("globex") == ["json", "mirror"]
    assert await listed("limited") == [BASE_MODEL, "shout"]


async def test_a_resident_adapter_is_asked_for_on_every_request(door):
    assert (await door.complete("globex", "mirror")).status_code == 200
    assert (await door.complete("acme", "mirror")).status_code == 404
    door.tenants["globex"]["adapters"] = ["json"]
    door.write()
    door.keys.look()
    assert (await door.complete("globex", "mirror")).status_code == 404, "no request later than the change"
    assert (await door.complete("globex", "json")).status_code == 200


async def test_the_tenant_is_the_keys_whoever_the_user_is_said_to_be(door, monkeypatch):
    seen = []
    real = door.service._generator.generate

    def generate(request, *args):
        seen.append((request.tenant, request.share))
        return real(request, *args)

    monkeypatch.setattr(door.service._generator, "generate", generate)
    for who, user in (("acme", None), ("acme", "globex"), ("globex", "acme"), ("admin", "acme")):
        model = "shout" if who != "globex" else "json"
        assert (await door.complete(who, model, user=user)).status_code == 200
    assert seen == [("acme", None), ("acme", None), ("globex", 2.0), ("acme", None)]


@pytest.mark.parametrize(
    ("patterns", "model", "may"),
    [
        (["acme-*"], "acme-x", True),
        (["acme-*"], "acme", False),
        (["*"], "anything/at all", True),
        (["*"], "hub:acme/x", False),  # names are not references
        (["*"], 'merge:{"adapters":[{"ref":"hub:acme/x","weight":1}]}', False),
        (["a*"], 'merge:{"adapters":[{"name":"a","weight":1},{"name":"b","weight":1}]}', False),
        (["a*"], 'merge:{"adapters":[{"name":"a","weight":1},{"name":"ab","weight":1}]}', True),
        (["a*", "hub:acme/*"], 'merge:{"adapters":[{"name":"a","weight":1},{"ref":"hub:acme/x","weight":1}]}', True),
        (["*x"], "hub:acme/x", False),
        (["hub:acme/*"], "hub:acme/x", True),
        (["hub:acme/*"], "hub:acme/x@v1", True),
        (["hub:acme/x@v1"], "hub:acme/x@v1", True),
        (["hub:acme/x@v1"], "hub:acme/x", False),
        (["hub:acme/*"], "hub:acme-evil/x", False),
        (["hub:acme/*"], "hub:acme/../globex", False),
        (["local:/data/acme/*"], "local:/data/acme/x", True),
        (["local:/data/acme/*"], "local:/data/acme/../globex/x", False),
        (["local:/data/acme/*"], "local:/data/acme/./x/../y", True),
        (["s3://acme/*"], "s3://acme/x", True),
        (["s3://acme/*"], "s3://acme-evil/x", False),
        ([], "x", False),
    ],
)
def test_patterns(patterns, model, may):
    assert Tenant("acme", tuple(patterns)).permits(model) is may


async def test_a_folder_is_judged_by_where_it_is(fleet, tmp_path):
    for name in ("acme", "globex"):
        shutil.copytree(DEMO / "adapters" / "shout", tmp_path / name / "x")
    (tmp_path / "acme" / "link").symlink_to(tmp_path / "globex" / "x")
    store = replace(STORE, allow=(f"local:{tmp_path}/*",))
    made = Door(fleet, tmp_path, store, acme={"adapters": [f"local:{tmp_path}/acme/*"]})
    try:
        statuses = [
            (await made.complete("acme", f"local:{tmp_path}/{path}")).status_code
            for path in ("acme/x", "acme/link", "acme/../globex/x", "globex/x", "acme/none")
        ]
        assert statuses == [200, 404, 404, 404, 404]
        assert (await made.complete("admin", f"local:{tmp_path}/globex/x")).status_code == 200
    finally:
        await made.close()


async def test_code_of_the_cluster_says_for_whom_it_asks_or_may_use_everything(door):
    directory = door.directory
    assert await directory.resolve("json", operator()) is not None
    assert await directory.resolve("json", Caller()) is not None, "without keys nobody is turned away"
    for tenant in (Tenant("acme", ("shout",)), Tenant("nobody", (), base_model=False)):
        with pytest.raises(Exception, match="none that you may use"):
            await directory.resolve("json", Caller(tenant, "tenant"))


async def test_many_at_once_get_each_their_own(door):
    asks = [(who, model) for who in ("acme", "globex") for model in ("shout", "json", "mirror", "spanish")] * 3
    answers = await asyncio.gather(*(door.get(f"/v1/models/{model}", who) for who, model in asks))
    allowed = {("acme", "shout"), ("globex", "json"), ("globex", "mirror")}
    assert [answer.status_code == 200 for answer in answers] == [ask in allowed for ask in asks]


def test_references_that_are_found_are_permitted_as_such():
    tenant = Tenant("acme", ("hub:acme/*",))
    assert tenant.permits_found("hub:acme/x", AdapterRef.parse("hub:acme/x@" + "0" * 40))
    assert not tenant.permits_found("hub:acme/x", AdapterRef.parse("hub:globex/x"))
