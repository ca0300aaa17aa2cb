"""The picture of the console in README.md: the demo server under some load, in a real browser.

python -m benchmarks.console --out docs/images/console.png
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
from pathlib import Path

import httpx
from playwright.async_api import expect

from benchmarks.console.browser import chromium
from benchmarks.serving.server import ROOT, Server
from examples.demo.words import held_out_prompts

START_SECONDS = 180
ADAPTERS = ("shout", "spanish", "json", "mirror")
CLIENTS = 24
LOAD_SECONDS = 25


async def load(url: str) -> None:
    """Clients that ask adapters, some much more often than others, until cancelled."""
    prompts = held_out_prompts(50)

    async def client(number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            while True:
                (model,) = chance.choices(ADAPTERS, weights=(8, 4, 2, 1))
                body = {"model": model, "prompt": chance.choice(prompts), "max_tokens": 200, "ignore_eos": True}
                with contextlib.suppress(httpx.HTTPError):
                    await http.post("/v1/completions", json=body | {"user": f"tenant-{number % 7}", "seed": number})

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number))


async def shoot(url: str, out: Path) -> None:
    """Write the picture."""
    async with chromium() as browser:
        page = await browser.new_page(viewport={"width": 1280, "height": 900})
        await page.goto(f"{url}/console")
        await expect(page.locator("#connection")).to_have_text("Live", timeout=60_000)
        busy = asyncio.create_task(load(url))
        await asyncio.sleep(LOAD_SECONDS)
        for side, name in (("left", "shout"), ("right", "json")):
            await page.locator(f"#model-{side}").fill(name)
            await page.locator(f"#model-{side}").press("Tab")
        await page.get_by_label("completion").check()
        await page.locator("#prompt").fill(held_out_prompts(1)[0])
        await page.locator("#prompt").press("Control+Enter")
        await expect(page.locator("#playground-status")).to_contain_text("done", timeout=60_000)
        await page.evaluate("document.activeElement.blur()")
        await page.wait_for_timeout(1500)
        out.parent.mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=out, full_page=True)
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)


def main() -> None:
    """Start the demo server, and shoot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "console.png")
    arguments = parser.parse_args()
    server = Server()
    server.config["engine"]["slots"] = {16: 3, 8: 5}
    server.start(held_out_prompts(1)[0], START_SECONDS)
    try:
        asyncio.run(shoot(server.url, arguments.out))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
