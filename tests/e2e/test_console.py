"""The console in headless Chromium, on the real server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from playwright.async_api import Page, Route, expect

from benchmarks.console.browser import BrowserMissing, chromium, executable
from examples.demo.words import answer, held_out_prompts

from .adapters import publish

PROMPT = held_out_prompts(1)[0]
MARKUP = "<img src=x onerror=window.pwned=1>"  # a folder, and so an adapter, may be called that
SPIED = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@pytest.fixture
async def page(server) -> AsyncIterator[Page]:
    """The console, open. Afterwards: nothing went wrong in it."""
    try:
        executable()
    except BrowserMissing as missing:
        pytest.skip(str(missing))
    wrong: list[str] = []
    async with chromium() as browser:
        opened = await browser.new_page()
        opened.set_default_timeout(60_000)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("console", lambda said: wrong.append(said.text) if said.type in {"error", "warning"} else None)
        opened.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(server.url) else None)
        await opened.add_init_script(SPIED)
        await opened.goto(f"{server.url}/console")
        await expect(opened.locator("#connection")).to_have_text("Live", timeout=60_000)
        yield opened
        assert await opened.evaluate("window.violations") == []
        assert await opened.evaluate("window.pwned") is None
        assert [one for one in wrong if "status of 404" not in one] == []  # a model that a test made up


async def choose(page: Page, side: str, name: str) -> None:
    """Search for a model and take it, with the keyboard alone."""
    field = page.locator(f"#model-{side}")
    await field.fill(name)
    await expect(page.locator(f"#choices-{side} li").first).to_have_text(name)
    await field.press("ArrowDown")
    await field.press("Enter")
    await expect(page.locator(f"#choices-{side}")).to_be_hidden()
    assert await field.input_value() == name


async def asking_for(page: Page, **more: object) -> None:
    """Have the playground's requests ask for more than it has fields for."""

    async def add(route: Route) -> None:
        await route.continue_(post_data=json.dumps(route.request.post_data_json | more))

    await page.route(re.compile("/v1/.*completions$"), add)


async def test_a_request_is_on_the_page_within_two_seconds(page: Page, server):
    await expect(page.locator(".replica")).to_have_count(2)
    await expect(page.locator("#versions")).to_contain_text("torch")
    await expect(page.locator(".tile", has_text="Replicas")).to_contain_text("2 running", timeout=60_000)
    seconds = []
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        for name in ("console-one", "console-two", "console-three"):
            publish(server, name, like="shout", revision=name)
            body = {"model": name, "prompt": PROMPT, "max_tokens": 8}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            answered = time.monotonic()
            await page.locator(".slot b", has_text=name).first.wait_for()
            seconds.append(time.monotonic() - answered)
    assert min(seconds) < 2.0, seconds
    slot = page.locator(".slot", has=page.locator("b", has_text="console-three")).first
    await expect(slot).to_contain_text("r4 · ")
    await expect(page.locator("#routing tr").first).to_contain_text("home")


async def test_two_adapters_stream_side_by_side_and_can_be_stopped(page: Page):
    await choose(page, "left", "shout")
    await choose(page, "right", "mirror")
    await page.get_by_label("completion").check()
    await page.locator("#prompt").fill(PROMPT)
    await page.locator("#prompt").press("Control+Enter")
    await expect(page.locator("#playground-status")).to_have_text("shout: done; mirror: done", timeout=60_000)
    for side, name in (("left", "shout"), ("right", "mirror")):
        assert await page.locator(f"#output-{side}").inner_text() == answer(PROMPT, name)
        figures = await page.locator(f"#figures-{side}").inner_text()
        assert all(part in figures for part in ("first token", "ms", "tokens/s", "tokens · stop")), figures

    await asking_for(page, ignore_eos=True)
    await page.locator("#max-tokens").fill("450")
    await page.get_by_role("button", name="Send to both").click()
    await expect(page.locator("#output-left")).to_have_text(re.compile("...."), timeout=60_000)
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator("#playground-status")).to_contain_text("stopped")
    await expect(page.locator(".slot.busy").locator("visible=true")).to_have_count(1, timeout=60_000)  # of the legend


async def test_names_and_answers_are_text_whatever_they_hold(page: Page, server):
    publish(server, MARKUP, like="shout", revision="markup")
    await choose(page, "left", MARKUP)
    await page.locator("#model-right").fill("</pre><script>window.pwned=2</script>")  # there is none of this name
    await asking_for(page, guided_choice=[MARKUP * 2])
    await page.locator("#prompt").fill(f"{PROMPT} {MARKUP}")
    await page.get_by_role("button", name="Send to both").click()
    await expect(page.locator("#playground-status")).to_contain_text("failed", timeout=60_000)
    assert await page.locator("#output-left").inner_text() == MARKUP * 2
    assert "<script>window.pwned=2</script>" in await page.locator("#output-right").inner_text()
    await page.locator(".slot b", has_text=MARKUP).first.wait_for()
    assert await page.locator("main img, main script, main a").count() == 0


async def test_a_key_is_kept_in_the_page_alone(page: Page):
    sent: list[str] = []
    async with asyncio.timeout(60):
        page.on("request", lambda asked: sent.append(asked.headers.get("authorization", "")))
        await page.locator("#api-key").fill("lf-secret")
        await page.locator("#api-key").press("Tab")
        while "Bearer lf-secret" not in sent:
            await page.wait_for_timeout(20)
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, history.state])"
    assert "lf-secret" not in await page.evaluate(kept)
    await page.reload()
    assert await page.locator("#api-key").input_value() == ""
