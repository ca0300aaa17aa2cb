"""Generate from another Ray application, through the server's Serve handle.

    .venv/bin/python examples/handle_client.py                 # on the machine where `serve run serve_config.yaml` runs
    RAY_ADDRESS=<head>:6379 .venv/bin/python examples/handle_client.py

The process needs Ray and nothing else of the server. RAY_AUTH_MODE must be what it is for the server, or a call waits
for ever; ``make serve`` and the scripts in ``examples/cluster`` say "disabled" unless told otherwise.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before Ray is imported, which reads it

import ray
from ray import serve


def main() -> None:
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    fleet: Any = serve.get_app_handle("lorafleet")

    models = [model["id"] for model in fleet.models.remote().result()]
    print("models:", ", ".join(models))

    # One whole answer. The dict holds what the body of /v1/completions or /v1/chat/completions would hold.
    request = {"model": models[-1], "prompt": "robot, old, eats, school", "max_tokens": 64, "temperature": 0}
    answer = fleet.generate.remote(request).result()
    print(f"{answer['model']}: {answer['text']} ({answer['finish_reason']}, {answer['usage']['total_tokens']} tokens)")

    # The same as a stream, from a chat this time.
    chat = {"model": models[-1], "messages": [{"role": "user", "content": "cat, shy, sings, garden"}], "temperature": 0}
    for piece in fleet.options(stream=True).stream.remote(chat):
        sys.stdout.write(piece["text"])
        sys.stdout.flush()
    print()

    # Errors are built-in exceptions that carry the fields of the HTTP error.
    try:
        fleet.generate.remote({"model": "nobody", "prompt": "hello"}).result()
    except LookupError as error:
        print(f"as expected: {error.cause} (status {error.status}, code {error.code})")  # pyright: ignore


if __name__ == "__main__":
    main()
