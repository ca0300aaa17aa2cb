"""Tokenizer and chat templates against transformers, and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from engine.request import InvalidRequest
from engine.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool>", "</tool>"]
CORPUS = ["The old robot eats in the school.", "user assistant system ñandú straße 机器人 😀🦜", "{'a': 1} [INST]"]

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {%- if enable_thinking | default(false) and message.reasoning_content is defined %}
                {{- '<think>' + message.reasoning_content + '</think>' }}
            {%- endif %}
            {%- if message.content is defined %}{{ message.content }}{% endif %}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool>' }}{{ call.function | tojson(indent=2) }}{{ '</tool>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

INST = """\
{{ bos_token }}{% set found = namespace(system='') %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% set found.system = message.content %}
        {% continue %}
    {% endif %}
    {% if message.role not in ['user', 'assistant'] %}
        {{ raise_exception('only user and assistant roles, not ' ~ message.role) }}
    {% endif %}
    {% if message.role == 'user' %}
 [INST] {{ found.system ~ ' ' if found.system and loop.last else '' }}{{ message.content | trim }} [/INST]
    {%- else %}
 {{ message.content }}{{ eos_token }}
    {%- endif %}
{% endfor %}
"""

DATED = """\
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '01 Jan 2025' -%}
<s>Date: {{ today }}
{% for m in messages %}
    {%- if m.content is string %}
{{ m.role }}: {{ m.content | trim }}
    {%- else %}
{{ m.role }}: {% for part in m.content %}{{ part.text if part.type == 'text' else '[' + part.type + ']' }}{% endfor %}

    {%- endif %}
    {%- if loop.index > 6 %}{% break %}{% endif %}
{% endfor %}
{%- for document in documents or [] %}{{ document.title }}: {{ document.text }}
{% endfor %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {"name": "wetter", "description": "<b>größe & ort</b>", "parameters": {"x": [1, 2.5]}},
    }
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"role": "user", "content": "  The old robot?  "}],
    "turns": [
        {"role": "system", "content": "Sei höflich 机器人."},
        {"role": "user", "content": "eats <|im_end|> in"},
        {"role": "assistant", "content": "the \U0001f600 school"},
        {"role": "user", "content": "ñandú\n\n"},
    ],
}
TOOL_CHAT = [
    {"role": "user", "content": "Wetter?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "hmm ü",
        "tool_calls": [{"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln <&>"}}}],
    },
    {"role": "tool", "content": "12 °C"},
]
PARTS_CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "see "}, {"type": "image"}, {"type": "text", "text": "?"}]}
]


def train(folder: Path, config: dict[str, Any] | None = None, template: str | None = None, bos: bool = False) -> Path:
    """A byte-level BPE tokenizer of some 350 tokens, as a model folder holds it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def assert_same_chat(folder: Path, messages: list[dict[str, Any]], **options: Any) -> str:
    """Text and ids are transformers'; returns the text."""
    ours, oracle = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    text = ours.render_chat(messages, **options)
    assert text == oracle.apply_chat_template(messages, tokenize=False, **options)
    ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ours.encode_chat(messages, **options) == ids
    return text


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [CHATML, INST, DATED], ids=["chatml", "inst", "dated"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(tmp_path: Path, template: str, chat: str, prompt: bool) -> None:
    folder = train(tmp_path / "m", template=template, bos=True)
    text = assert_same_chat(folder, CHATS[chat], add_generation_prompt=prompt)
    assert CHATS[chat][0]["content"].strip() in text


def test_tools_reasoning_and_extra_options_equal_transformers(tmp_path: Path) -> None:
    folder = train(tmp_path / "m", template=CHATML)
    text = assert_same_chat(folder, TOOL_CHAT, tools=TOOLS, add_generation_prompt=True, enable_thinking=True)
    assert "<think>hmm ü</think>" in text
    assert "Köln <&>" in text
    assert "<b>größe & ort</b>" in text
    assert_same_chat(folder, TOOL_CHAT, tools=TOOLS, add_generation_prompt=False)


def test_content_parts_and_documents_equal_transformers(tmp_path: Path) -> None:
    folder = train(tmp_path / "m", template=DATED)
    documents = [{"title": "Eins", "text": "größer"}]
    text = assert_same_chat(folder, PARTS_CHAT, documents=documents, add_generation_prompt=False)
    assert "see [image]?" in text
    assert "Eins: größer" in text


@pytest.mark.parametrize(
    ("template", "content"),
    [
        *((template, content) for template in (INST, DATED, CHATML) for content in ("The old", "The old ")),
        (DATED, [{"type": "text", "text": "The old"}]),
    ],
)
def test_continued_final_message_equals_transformers(tmp_path: Path, template: str, content: Any) -> None:
    folder = train(tmp_path / "m", template=template)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    text = assert_same_chat(folder, messages, continue_final_message=True, add_generation_prompt=False)
    assert text.rstrip().endswith("The old")


def test_named_templates_in_the_configuration(tmp_path: Path) -> None:
    named = [{"name": "default", "template": INST}, {"name": "tool_use", "template": CHATML}]
    folder = train(tmp_path / "m", {"chat_template": named})
    assert "[INST]" in assert_same_chat(folder, CHATS["plain"], add_generation_prompt=True)
    assert "<|im_start|>" in assert_same_chat(folder, CHATS["plain"], tools=TOOLS, add_generation_prompt=True)
    assert "[INST]" in assert_same_chat(train(tmp_path / "s", {"chat_template": INST}), CHATS["plain"])


def test_additional_template_files(tmp_path: Path) -> None:
    folder = train(tmp_path / "m", template=INST)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML, encoding="utf-8")
    assert "[INST]" in assert_same_chat(folder, CHATS["plain"], add_generation_prompt=True)
    assert "<|im_start|>" in assert_same_chat(folder, CHATS["plain"], tools=TOOLS, add_generation_prompt=True)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "special": True}},
        {"extra_special_tokens": ["<new>"], "pad_token": "<pad>", "image_token": "<late>"},
        {
            "added_tokens_decoder": {
                "900": {"content": "<late>", "special": True, "lstrip": False, "rstrip": True, "normalized": False},
                "901": {"content": "school", "special": False, "lstrip": True, "rstrip": False, "normalized": True},
            }
        },
    ],
    ids=["plain", "bos", "bos-eos", "no-bos", "token-object", "extra", "added"],
)
@pytest.mark.parametrize("bos", [True, False])
def test_encode_and_decode_equal_transformers(tmp_path: Path, config: dict[str, Any], bos: bool) -> None:
    folder = train(tmp_path / "m", config, bos=bos)
    ours, oracle = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("", "The old robot", "a<|im_end|>b <new> <late>  school <pad>", "ñ机器人😀🦜\n\t  x", "\u0000"):
        ids = oracle(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == oracle(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(oracle)


def test_padding_and_truncation_in_the_file_are_ignored(tmp_path: Path) -> None:
    folder = train(tmp_path / "m")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_dir(folder).encode("The old robot eats in the school.")) > 3
    assert len(Tokenizer.from_dir(folder).encode("x")) == 1


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    folder = train(tmp_path / "m")
    assert Tokenizer.from_dir(folder).eos_token_ids == (1,)
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    assert Tokenizer.from_dir(folder).eos_token_ids == (3, 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert Tokenizer.from_dir(folder).eos_token_ids == (3, 5, 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.from_dir(folder).eos_token_ids == (1,)


def test_errors_of_a_template_name_it_and_blame_the_messages(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(train(tmp_path / "marvin", template=INST))
    with pytest.raises(InvalidRequest, match=r"marvin refused.*only user and assistant roles, not pirate") as caught:
        tokenizer.render_chat([{"role": "pirate", "content": "x"}])
    assert caught.value.param == "messages"
    concatenating = Tokenizer.from_dir(train(tmp_path / "zaphod", template=CHATML))
    with pytest.raises(InvalidRequest, match="zaphod refused the messages: TypeError"):
        concatenating.render_chat([{"role": "user", "content": ["no", "text"]}])
    with pytest.raises(InvalidRequest, match="at least one message"):
        tokenizer.render_chat([])
    with pytest.raises(InvalidRequest, match="choose one"):
        tokenizer.render_chat(CHATS["plain"], continue_final_message=True)
    with pytest.raises(InvalidRequest, match="no text to continue"):
        tokenizer.render_chat([{"role": "assistant"}], continue_final_message=True, add_generation_prompt=False)
    broken = Tokenizer.from_dir(train(tmp_path / "broken", template="{% if %}"))
    with pytest.raises(InvalidRequest, match="TemplateSyntaxError"):
        broken.render_chat(CHATS["plain"])
    escape = Tokenizer.from_dir(train(tmp_path / "escape", template="{{ ''.__class__.__mro__ }}"))
    with pytest.raises(InvalidRequest, match="SecurityError"):
        escape.render_chat(CHATS["plain"])


def test_a_missing_template_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no chat template.*chat_template\.jinja") as caught:
        Tokenizer.from_dir(train(tmp_path / "m")).render_chat(CHATS["plain"])
    assert caught.value.param == "messages"
    only_tools = train(tmp_path / "t", {"chat_template": [{"name": "tool_use", "template": CHATML}]})
    with pytest.raises(InvalidRequest, match="it has tool_use but no default"):
        Tokenizer.from_dir(only_tools).render_chat(CHATS["plain"])


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="copy it from the model's repository"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"only tokenizer\.model\. Convert it once: .*save_pretrained"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    folder = train(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        Tokenizer.from_dir(folder)


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"lone surrogate.*character 2"):
        Tokenizer.from_dir(train(tmp_path / "m")).encode("ab\ud800c")


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(train(tmp_path / "m", template="{{ messages[0].content }}"))
    longest = len("<|im_start|>")
    fits = "<|im_start|>" * 10
    assert len(tokenizer.encode(fits, most_tokens=10)) == 10
    with pytest.raises(InvalidRequest, match=rf"121 bytes, too many.*10 tokens.*more than {longest}") as caught:
        tokenizer.encode(fits + "x", most_tokens=10)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(InvalidRequest, match="121 bytes") as caught:
        tokenizer.encode_chat([{"role": "user", "content": fits + "x"}], 10)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    assert len(tokenizer.encode_chat([{"role": "user", "content": fits}], 10)) == 10
    assert len(tokenizer.encode(fits + "x")) == 11


def test_text_is_never_refused_where_a_token_may_swallow_more_of_it(tmp_path: Path) -> None:
    added = {"900": {"content": "<wide>", "special": True, "lstrip": True, "rstrip": False, "normalized": False}}
    tokenizer = Tokenizer.from_dir(train(tmp_path / "m", {"added_tokens_decoder": added}))
    assert len(tokenizer.encode(" " * 1000 + "<wide>", most_tokens=1)) == 1


def test_other_threads_run_while_a_long_text_is_tokenized(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(train(tmp_path / "m"))
    text = "The old robot eats in the school. " * 40_000
    worker = threading.Thread(target=tokenizer.encode, args=(text,))
    start = last = time.perf_counter()
    worker.start()
    longest_wait = 0.0
    while worker.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest_wait, last = max(longest_wait, now - last), now
    assert longest_wait < (last - start) / 2


def test_transformers_and_torch_are_not_imported() -> None:
    code = "import sys, engine.tokenizer; print(sorted({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_bytes_of_a_token_are_those_of_parts_of_characters_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(train(tmp_path / "m"))
    text = "ñandú 机 🦋 \ufffd<|im_end|>"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(token) or b"?" for token in ids) == text.encode()
    assert sum("\ufffd" in tokenizer.token_text(token) for token in ids) > 3
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b"", "an id of the model without a token decodes to nothing"


def test_bytes_that_the_tokenizer_does_not_tell_are_none(tmp_path: Path) -> None:
    folder = train(tmp_path / "m")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    part = backend.encode("🦋").ids[-1]
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "y")])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.token_text(part) == "\ufffd" and tokenizer.token_bytes(part) is None
    assert tokenizer.token_bytes(backend.encode("x").ids[0]) == b"y"
