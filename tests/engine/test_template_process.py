"""Templates of people who are not trusted: the same text as in this process, and nothing else that they could want."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import template_process
from engine.chat_template import BadTemplate, ChatTemplate
from engine.request import InvalidRequest
from engine.template_process import TemplateProcess
from engine.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "examples/demo/model"
MESSAGES = [{"role": "system", "content": "spanish \ud83d\u2028"}, {"role": "user", "content": 'say "é"\n'}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"b": 1, "a": 0.5}}}]
PLAIN = "{{ messages[-1].content }}"


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    """Started where signals are blocked, as a thread of somebody's may have them."""
    made = TemplateProcess()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    yield made
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    made.close()


def render(process: TemplateProcess, template: str, **options: object) -> str:
    return process.render({"default": template}, {"bos_token": "<s>"}, "tenant", MESSAGES, options)


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}{{ messages | tojson }}{{ tools | tojson(indent=1) }}{{ kind }}", None]
)
def test_the_text_is_the_one_that_this_process_makes(process: TemplateProcess, template: str | None) -> None:
    tokenizer = Tokenizer.from_dir(MODEL)
    sources = {"default": template or (MODEL / "chat_template.jinja").read_text()}
    options = {"tools": TOOLS, "kind": "x", "add_generation_prompt": True}
    here = ChatTemplate(sources, tokenizer.special_tokens, "tenant").render(MESSAGES, **options)
    assert process.render(sources, tokenizer.special_tokens, "tenant", MESSAGES, options) == here


def test_a_template_of_its_own_for_tools_is_used_for_them(process: TemplateProcess) -> None:
    sources = {"default": "plain", "tool_use": "tools"}
    assert process.render(sources, {}, "tenant", MESSAGES, {"tools": TOOLS}) == "tools"
    assert process.render(sources, {}, "tenant", MESSAGES, {}) == "plain"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ raise_exception('only two roles') }}",
        "{{ messages[9].content.strip() }}",
    ],
)
def test_what_the_sandbox_or_the_template_refuses_is_the_messages_fault(
    process: TemplateProcess, template: str
) -> None:
    with pytest.raises(InvalidRequest, match="the chat template of tenant refused the messages") as caught:
        render(process, template)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a\n{% if messages %}", "line 2: Unexpected end of template"),
        ("{{ messages | nothing }}", "line 1: No filter named 'nothing'"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{{ 'a' * 10**10 }}", "512 MiB"),
        ("{{ ('a' * messages | length * 10**9) | length }}", "512 MiB"),
        ("{{ 'a' * messages | length * 10**7 }}", "20000000 characters"),
    ],
)
def test_a_template_that_is_wrong_or_takes_too_much_is_refused_and_the_next_is_rendered(
    process: TemplateProcess, template: str, said: str
) -> None:
    for _ in range(1 if "1 s" in said else 2):
        with pytest.raises(BadTemplate, match=said):
            render(process, template)
    assert render(process, PLAIN) == MESSAGES[-1]["content"]


def test_this_servers_credentials_are_not_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_that_must_not_leak")
    process = TemplateProcess()
    try:
        assert render(process, PLAIN)
        assert process._process is not None
        environment = Path(f"/proc/{process._process.pid}/environ")
        if environment.exists():
            assert b"hf_a_secret" not in environment.read_bytes()
    finally:
        process.close()


def test_a_process_that_cannot_start_is_no_templates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_ENVIRONMENT", ("PYTHONHOME",))
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(RuntimeError, match="exit status 1"):
        render(TemplateProcess(), PLAIN)


def test_a_process_that_was_killed_is_replaced(process: TemplateProcess) -> None:
    assert render(process, PLAIN)
    assert process._process is not None
    os.kill(process._process.pid, 9)
    process._process.wait()
    assert render(process, PLAIN) == MESSAGES[-1]["content"]
