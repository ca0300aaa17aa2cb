"""Talk to a running server with the openai package: pip install openai.

.venv/bin/python examples/openai_client.py [http://127.0.0.1:8000]
"""

from __future__ import annotations

import asyncio
import sys

import openai

PROMPT = "robot, old, eats, school"


async def main(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        models = [model.id async for model in await client.models.list()]
        print("models:", ", ".join(models))

        # Every model at once: their rows share the same batches.
        async def complete(model: str) -> str:
            made = await client.completions.create(model=model, prompt=PROMPT, max_tokens=64, temperature=0)
            return made.choices[0].text

        for model, text in zip(models, await asyncio.gather(*map(complete, models)), strict=True):
            print(f"{model:>16}: {text}")

        print("a streamed chat: ", end="")
        stream = await client.chat.completions.create(
            model=models[-1], messages=[{"role": "user", "content": PROMPT}], temperature=0, stream=True
        )
        async for event in stream:
            print(event.choices[0].delta.content or "", end="", flush=True)
        print()

        try:
            await client.completions.create(model="nobody", prompt=PROMPT)
        except openai.NotFoundError as error:
            print("as expected:", error.message)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
