"""``serve run`` that lets running requests finish when it is told to stop.

    python -m deployments.run serve_config.yaml

On Ctrl-C Serve's own command ends its HTTP proxies at once, and with them every request. This one takes the
applications away first, which lets what runs finish within ``graceful_shutdown_timeout_s``, and then does the same. It
does so on SIGTERM too. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.scripts import cli


def main(arguments: Sequence[str]) -> None:
    """Run what ``serve run`` would with these arguments, until told to stop."""
    cli.main(["run", "--non-blocking", *arguments], standalone_mode=False)
    signal.signal(signal.SIGTERM, _interrupt)  # not before: Ray sets its own
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        print("stopping: running requests may finish (Ctrl-C again: at once)", flush=True)
    try:
        while names := list(serve.status().applications):
            with contextlib.suppress(TimeoutError):  # it does not wait for longer than a minute
                serve.delete(names[0])
    except KeyboardInterrupt:
        print("not waiting any longer", flush=True)
    finally:
        serve.shutdown()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1:])
