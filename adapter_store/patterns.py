"""Regular expressions that come from an adapter's author, evaluated so that they cannot stall the process.

Python's ``re`` holds the interpreter lock while it backtracks, so one hostile pattern in one tenant's
adapter_config.json would stop every other tenant's tokens for as long as it likes. Patterns that repeat or branch are
therefore evaluated in a child process with a time limit; plain names, which is what nearly every adapter has, are
matched here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

TIME_LIMIT_S = 5.0
MAX_PATTERNS = 4096

# Nothing in these can backtrack: letters, digits, dots (escaped or not), anchors.
_PLAIN = re.compile(r"(?:[\w^$-]|\\?\.)*")

_CHILD = """
import json, re, sys
patterns, keys = json.load(sys.stdin)
answers = []
for mode, pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        print(json.dumps({"bad": pattern, "why": str(error)}))
        break
    match = compiled.fullmatch if mode == "full" else compiled.match
    found = [match(key) for key in keys]
    answers.append([m and (m.groupdict().get("idx") or "") for m in found])
else:
    print(json.dumps({"answers": answers}))
"""


class Pattern(NamedTuple):
    """A regular expression and how it is applied: to the ``full`` text, or as a ``prefix`` match from its start.

    ``plain`` marks one whose author's part was already seen to hold plain names only.
    """

    mode: Literal["full", "prefix"]
    text: str
    plain: bool = False


def is_plain(text: str) -> bool:
    """Whether a pattern is a mere name, in which no regular expression engine can lose time."""
    return _PLAIN.fullmatch(text) is not None


def match_patterns(patterns: Iterable[Pattern], keys: Sequence[str]) -> dict[Pattern, dict[str, str]]:
    """For each pattern, the keys that match it, with the text of the group ``idx`` ("" when there is none).

    Raises ValueError naming the pattern when it is no regular expression, takes too long, or there are too many.
    """
    wanted = list(dict.fromkeys(patterns))
    if len(wanted) > MAX_PATTERNS:
        raise ValueError(f"it holds {len(wanted)} patterns; at most {MAX_PATTERNS} are read")
    result: dict[Pattern, dict[str, str]] = {}
    for pattern in wanted:
        if pattern.plain or is_plain(pattern.text):
            compiled = re.compile(pattern.text)
            match = compiled.fullmatch if pattern.mode == "full" else compiled.match
            found = ((key, match(key)) for key in keys)
            result[pattern] = {key: m.groupdict().get("idx") or "" for key, m in found if m is not None}
    rest = [pattern for pattern in wanted if pattern not in result]
    if rest:
        answers = _ask_child(rest, keys)
        for pattern, answer in zip(rest, answers, strict=True):
            result[pattern] = {key: idx for key, idx in zip(keys, answer, strict=True) if idx is not None}
    return result


def _ask_child(patterns: Sequence[Pattern], keys: Sequence[str]) -> list[list[str | None]]:
    question = json.dumps([[(p.mode, p.text) for p in patterns], list(keys)])
    command = [sys.executable or "python3", "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(  # noqa: S603 - the command is ours; the pattern travels as data on stdin
            command, input=question.encode(), capture_output=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        texts = ", ".join(repr(p.text[:80]) for p in patterns[:3])
        raise ValueError(f"matching {texts} took over {TIME_LIMIT_S:g} s; list the module names instead") from None
    if done.returncode != 0:
        raise ValueError(f"matching {patterns[0].text[:80]!r} failed; list the module names instead")
    answer = json.loads(done.stdout)
    if "bad" in answer:
        raise ValueError(f"{answer['bad'][:80]!r} is no regular expression: {answer['why']}")
    return answer["answers"]
