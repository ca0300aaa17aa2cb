"""A private adapter needs its caller's own token, on every request; and no secret is written down anywhere."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace

import pytest

from deployments.tenants import source_proofs
from tests.adapter_store.hub_server import TOKEN, Fault, hub_asked_without_token
from tests.deployments.conftest import DEMO, STORE

from .conftest import KEYS, PROMPT, Door

PRIVATE = "hub:acme/private"


def files(like: str = "shout", **config: object) -> dict[str, bytes]:
    folder = DEMO / "adapters" / like
    written = json.loads((folder / "adapter_config.json").read_text()) | config
    return {
        "adapter_config.json": json.dumps(written).encode(),
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
    }


@pytest.fixture
def hub(monkeypatch):
    with hub_asked_without_token(monkeypatch) as server:
        server.publish("acme/private", files(revision="private"), access="private")
        server.publish("acme/public", files(revision="public"))
        yield server


@pytest.fixture
async def private(fleet, hub, tmp_path):
    # The replica's own store has to read from the same Hub.
    sources = fleet.engine.parts.store.catalog.sources
    store = replace(STORE, hub_endpoint=hub.endpoint, cache_dir=str(tmp_path / "cache"), hub_refresh_s=3600.0)
    client, before = sources._hub._client, sources._hub._client._settings
    client._settings = client.tokens._settings = store
    patterns = {"adapters": ["shout", "hub:acme/*"]}
    made = Door(
        fleet,
        tmp_path,
        replace(store, cache_dir=str(tmp_path / "gateway")),
        acme=patterns,
        globex=patterns,
        limited=patterns | {"server_credentials": True},
    )
    yield made
    await made.close()
    client._settings = client.tokens._settings = before


async def test_a_private_adapter_is_shown_to_its_callers_token_alone(private, hub, monkeypatch):
    token = {"x-adapter-token": TOKEN}
    hidden = await private.complete("acme", PRIVATE)
    missing = await private.complete("acme", "hub:acme/nothing")
    assert hidden.status_code == missing.status_code == 404
    assert hidden.text.replace("private", "nothing") == missing.text
    shown = await private.complete("acme", PRIVATE, headers=token)
    assert shown.status_code == 200, shown.text
    # Resident, and its source's word fresh: still nobody else's, and not its own without the token.
    for who, headers in (("acme", {}), ("acme", {"x-adapter-token": "hf_wrong"}), ("globex", {}), ("limited", {})):
        assert (await private.complete(who, PRIVATE, headers=headers)).text == hidden.text
    asked = len(hub.requests("/api/models"))
    assert (await private.complete("acme", PRIVATE, headers=token)).status_code == 200
    assert len(hub.requests("/api/models")) == asked, "what was shown counts for a few seconds"
    assert (await private.complete("globex", PRIVATE, headers=token)).status_code == 200
    assert len(hub.requests("/api/models")) == asked + 1, "for nobody else"
    monkeypatch.setattr(source_proofs.time, "monotonic", lambda real=source_proofs.time.monotonic: real() + 11)
    hub.token = "hf_another"  # taken away
    assert (await private.complete("acme", PRIVATE, headers=token)).text == hidden.text


async def test_this_servers_token_is_not_lent_to_who_names_a_reference(private, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (await private.complete("acme", PRIVATE)).status_code == 404
    assert (await private.complete("acme", "hub:acme/public")).status_code == 200
    listed = hub.requests("/api/models")
    assert listed and all(seen.authorization is None for seen in listed)
    assert (await private.complete("limited", PRIVATE)).status_code == 200, "the keys file allows it"
    assert (await private.complete("admin", PRIVATE)).status_code == 200


async def test_a_source_that_is_down_proves_nothing(private, hub):
    token = {"x-adapter-token": TOKEN}
    assert (await private.complete("acme", PRIVATE, headers=token)).status_code == 200
    hub.fail(Fault("/api/models", 503))
    assert (await private.complete("globex", PRIVATE, headers=token)).status_code == 503


async def test_keys_tokens_and_prompts_are_written_down_nowhere(private, hub, capfd):
    """Every logger at its chattiest, over requests that succeed and that fail in every way."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    root, before = logging.getLogger(), {}
    names = ["", "ray.serve", "adapter_store", "engine", "deployments", "httpx", "huggingface_hub"]
    for logger in map(logging.getLogger, names):
        before[logger] = logger.level
        logger.setLevel(logging.INFO if logger is root else logging.DEBUG)
        logger.addHandler(handler)
    prompt, guess = "canary-prompt-5e2b robot", "lf-canary-guess-91c4"
    token = {"x-adapter-token": TOKEN}
    try:
        answers = [
            await private.complete("acme", PRIVATE, prompt=prompt, headers=token),
            await private.complete("acme", PRIVATE, prompt=prompt, headers=token, stream=True),
            await private.complete("acme", PRIVATE, prompt=prompt, headers={"x-adapter-token": "hf_canary_wrong"}),
            await private.complete("acme", "hub:acme/none", prompt=prompt, headers=token),
            await private.complete("acme", "shout", prompt=prompt, max_tokens=10**9),
            await private.complete("acme", "shout", prompt=prompt, temperature=-1),
            await private.complete("acme", "shout", prompt={"text": prompt}),
            await private.complete(guess, "shout", prompt=prompt),
            await private.http.post("/v1/completions", content=b'{"prompt": "' + prompt.encode(), headers=token),
        ]
        hub.publish("acme/broken", files(use_dora=True), access="private")
        answers.append(await private.complete("acme", "hub:acme/broken", prompt=prompt, headers=token))

        async def fails(*_):
            raise RuntimeError("the fleet broke")
            yield

        real, private.service._generator.generate = private.service._generator.generate, fails
        answers.append(await private.complete("acme", "shout", prompt=prompt, headers=token))
        private.service._generator.generate = real
        hub.fail(Fault("/api/models", 503))
        answers.append(await private.complete("globex", PRIVATE, prompt=prompt, headers=token))
        private.file.write_text(f"tenants: {{acme: {{keys: [{KEYS['acme']}]}}}}")
        private.keys.look()
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
            logger.removeHandler(handler)
    assert {one.status_code for one in answers} >= {200, 400, 401, 404, 422, 500, 503}
    said = written.getvalue() + "".join(capfd.readouterr())
    assert "the fleet broke" in said and "keys file" in said, "there is something to look through"
    for secret in (TOKEN, "hf_canary_wrong", guess, prompt, "canary-prompt", *KEYS.values()):
        assert secret not in said
    for answer in answers:
        assert TOKEN not in answer.text and KEYS["acme"] not in answer.text
    assert PROMPT not in said
