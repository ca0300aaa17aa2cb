"""Chat templates of people who are not trusted with this process, rendered in one of its own.

Jinja's sandbox keeps a template from reading what it should not, but not from computing for ever or filling the
memory. So such a template runs where both have a limit, and a process that went over it is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.chat_template import BadTemplate, ChatTemplate
from engine.request import InvalidRequest

CPU_SECONDS = 1.0  # for one chat; an ordinary one takes about a millisecond
MEMORY_BYTES = 512 << 20  # of address space, Python's own 50 MB included
MOST_CHARS = 16 << 20  # of a rendered chat
_MOST_COMPILED = 64
# What Python and the clock need of the environment; not the credentials that are there, too.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ", "TZDIR")


class TemplateProcess:
    """One process, started by the first chat. Chats of several threads are rendered one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        model: str,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> str:
        """What ``ChatTemplate(templates, special_tokens, model).render(messages, **options)`` returns.

        Raises as it does, BadTemplate for a template that does not compile or goes over a limit, and RuntimeError where
        the process cannot run.
        """
        asked = json.dumps([templates, special_tokens, model, messages, options]).encode()
        with self._lock:
            line = self._ask(asked)
        if not line.endswith(b"\n"):
            raise BadTemplate(f"takes more than {CPU_SECONDS:g} s or {MEMORY_BYTES >> 20} MiB to render a chat")
        kind, *told = json.loads(line)
        if kind == "invalid":
            raise InvalidRequest(*told)
        if kind == "bad":
            raise BadTemplate(*told)
        return told[0]

    def close(self) -> None:
        """End the process; a chat under way there is lost."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _ask(self, asked: bytes) -> bytes:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = _start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(asked + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            self._process = None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            if process.wait() > 0:  # else a signal ended it, which is what limits do
                raise RuntimeError(f"a process for chat templates ended with exit status {process.returncode}")
        return line


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "engine.template_process"]
    return subprocess.Popen(  # noqa: S603 - ourselves
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def _serve() -> None:
    """Answer lines with lines until the one who asks is gone."""
    compiled: OrderedDict[str, ChatTemplate] = OrderedDict()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # whose signal ends the process
        answer = json.dumps(_answer(compiled, line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(compiled: OrderedDict[str, ChatTemplate], line: bytes) -> list[str | None]:
    try:
        templates, special_tokens, model, messages, options = json.loads(line)
        key = hashlib.sha256(json.dumps([templates, special_tokens, model]).encode()).hexdigest()
        if key not in compiled:
            template = ChatTemplate(templates, special_tokens, model)
            template.compile()
            compiled[key] = template
            while len(compiled) > _MOST_COMPILED:
                compiled.popitem(last=False)
        compiled.move_to_end(key)
        text = compiled[key].render(messages, **options)
        if len(text) > MOST_CHARS:
            return ["bad", f"makes {len(text)} characters of a chat; at most {MOST_CHARS} can be a prompt"]
    except InvalidRequest as error:
        return ["invalid", str(error), error.param, error.code]
    except BadTemplate as error:
        return ["bad", str(error)]
    except MemoryError:
        return ["bad", f"takes more than {MEMORY_BYTES >> 20} MiB to render a chat"]
    return ["text", text]


if __name__ == "__main__":
    with contextlib.suppress(ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the one who starts this does with it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    try:
        _serve()
    except MemoryError:
        signal.raise_signal(signal.SIGKILL)
