"""Calls told from content: the formats, malformed ones, and that it does not matter where the pieces break."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.api.tool_calls import CallDelta, ToolCallParser
from deployments.api.tool_formats import FORMATS, LIST, tool_format

NAMES = ("weather", "f")
ALL = {**FORMATS, "list": LIST}


def parsed(pieces):
    """(content, [[name, arguments], ...]), and the laws of a stream on the way."""
    content, calls = "", []
    for piece in pieces:
        match piece:
            case str():
                assert piece
                content += piece
            case CallDelta(index, "", str(name)):
                assert index == len(calls), "calls come one after the other"
                calls.append([name, ""])
            case CallDelta(index, arguments, None):
                assert arguments and index == len(calls) - 1
                calls[index][1] += arguments
            case _:
                raise AssertionError(piece)
    return content, calls


def read(form, *texts):
    parser = ToolCallParser(ALL[form], NAMES)
    pieces = [piece for text in texts for piece in parser.push(text)] + parser.finish()
    return parsed(pieces)


def call(name="weather", key="arguments", **arguments):
    return json.dumps({"name": name, key: arguments})


def written(form, calls, before=""):
    """The way a model of this format writes these calls down."""
    match form:
        case "hermes":
            return before + "\n" * bool(before) + "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in calls)
        case "llama3":
            return "; ".join(calls)
        case "mistral":
            return before + f"[TOOL_CALLS][{', '.join(calls)}]"
    return f"[{', '.join(calls)}]"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(ALL)),
    st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=6), VALUES, max_size=3)), min_size=1),
    st.sampled_from(("arguments", "parameters")),
    st.booleans(),
    st.data(),
)
def test_calls_that_are_well_written_are_read_whatever_the_cuts(form, calls, key, name_last, data):
    def one(name, arguments):
        members = [("name", name), ("type", "function"), (key, arguments)]
        return json.dumps(dict(members[::-1] if name_last else members))

    before = "Let me see. <b>1 < 2</b> [a]" if form in ("hermes", "mistral") else ""
    text = written(form, [one(*entry) for entry in calls], before)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    content, found = read(form, *(text[a:b] for a, b in pairwise([0, *cuts, len(text)])))
    assert content == before
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<tool", "</", "[TOOL", "<|", "|>"),
    *('{"name": "f", "arguments": {"a": [1, "}"]}}', '{"name": "g", "arguments": {}}', '"arguments": "{\\"a\\": 1}"'),
    *(
        '{"name": "f"',
        '"arguments": {',
        ", ",
        "}",
        "{",
        "[",
        "]",
        ":",
        '"',
        "\\",
        ";",
        " ",
        "\n",
        "robot",
        "né",
        "1",
        "true",
    ),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(ALL)), st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.data())
def test_any_text_reads_the_same_whatever_the_cuts_and_its_content_has_no_markup(form, fragments, data):
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parser = ToolCallParser(ALL[form], NAMES)
    pieces = [one for a, b in pairwise([0, *cuts, len(text)]) for one in parser.push(text[a:b])] + parser.finish()
    assert parsed(pieces) == read(form, text)
    assert parsed(pieces) == read(form, *text)
    whole = [*ToolCallParser(ALL[form], NAMES).push(text + "."), *pieces]
    assert not any(mark in one for one in whole if isinstance(one, str) for mark in ALL[form].markup())


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab <>[]{}\n\t.,é|/", max_size=60))
def test_text_without_calls_is_content_to_the_character(text):
    assert read("hermes", text) == (text, [])


@pytest.mark.parametrize("form", sorted(ALL))
def test_several_calls_and_the_order_of_the_pieces(form):
    text = written(form, [call(city="Oslo"), call("f", "parameters", n=2)])
    assert read(form, text) == ("", [["weather", '{"city": "Oslo"}'], ["f", '{"n": 2}']])


def test_special_tokens_that_decoding_leaves_out():
    assert read("mistral", "[" + call(city="Oslo") + "]") == ("", [["weather", '{"city": "Oslo"}']])
    assert read("llama3", "  " + call(key="parameters", city="Oslo")) == ("", [["weather", '{"city": "Oslo"}']])
    assert read("llama3", 'say {"name": "f"}') == ('say {"name": "f"}', []), "only where the text begins with it"


def test_arguments_go_out_as_they_come():
    parser = ToolCallParser(FORMATS["hermes"], NAMES)
    assert parser.push('<tool_call>{"name": "wea') == []
    assert parser.push('ther", "arguments": {"ci') == [CallDelta(0, name="weather"), CallDelta(0, '{"ci')]
    assert parser.push('ty": "}"') == [CallDelta(0, 'ty": "}"')]
    assert parser.push("}}</tool_") == [CallDelta(0, "}")]
    assert parser.push("call> \n") == [] and parser.finish() == []


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>{"name": "weather", "arguments": {"ci', "", [["weather", '{"ci']]),  # the limit came
        ('<tool_call>{"name": "weather"}</tool_call>', "", [["weather", "{}"]]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [["f", '{"a": 1}']]),
        ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', '{"name": "unknown", "arguments": {}}', []),
        ("<tool_call>no JSON</tool_call> more", "no JSON more", []),
        ('<tool_call>{"arguments": {}}</tool_call>', '{"arguments": {}}', []),
        ('<tool_call>{"name": "f", "arguments": 3}</tool_call>', '{"name": "f", "arguments": 3}', []),
        ("a </tool_call> b", "a  b", []),
        ("ends <tool_c", "ends <tool_c", []),
        (f"<tool_call>{call('f')}<tool_call>{call('f')}", "", [["f", "{}"]] * 2),
        (f"<tool_call>{call('f')} and so on", "and so on", [["f", "{}"]]),
        (f'<tool_call>{{"x" <tool_call>{call("f")}</tool_call>', '{"x"', [["f", "{}"]]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}<tool_call>', "", [["f", '{"a": 1}']]),
    ],
)
def test_what_is_malformed(text, content, calls):
    assert read("hermes", text) == (content, calls)
    assert read("hermes", *text) == (content, calls)


def test_the_time_for_hostile_text_grows_with_its_length():
    """Each of these looks like the beginning of a call until the text ends."""
    text = '<tool_call>{"a":[' * 4000
    content, calls = read("hermes", text)
    assert calls == [] and content == '{"a":[' * 4000


def test_the_format_comes_from_the_setting_or_from_the_template():
    assert tool_format("hermes", "") is FORMATS["hermes"] and tool_format("none", "<tool_call>") is None
    assert tool_format(None, "...within <tool_call></tool_call> XML tags...") is FORMATS["hermes"]
    assert tool_format(None, '"[TOOL_CALLS] [" ~') is FORMATS["mistral"]
    llama = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    assert tool_format(None, llama) is FORMATS["llama3"]
    assert tool_format(None, "{{ messages }}") is None


def test_ids_of_calls_are_of_the_form_that_the_templates_of_such_models_want():
    assert len({FORMATS["hermes"].new_call_id() for _ in range(50)}) == 50
    assert FORMATS["hermes"].new_call_id().startswith("call_")
    assert len(FORMATS["mistral"].new_call_id()) == 9 and FORMATS["mistral"].new_call_id().isalnum()
