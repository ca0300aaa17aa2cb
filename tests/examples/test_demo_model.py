"""The committed demo weights: they load with transformers and PEFT unchanged, and answer held-out prompts exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoTokenizer

from examples.demo.evaluate import ADAPTER_FOLDER, FORMS, MODEL, generate, load, render
from examples.demo.words import ADAPTERS, BASE, STYLES, answer, held_out_prompts, tagged

Loaded = tuple[PeftModel, Any]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(request.param)
    torch.set_num_threads(threads)


def greedy(loaded: Loaded, style: str, rows: list[list[int]]) -> list[str | None]:
    model, tokenizer = loaded
    if style == BASE:
        with model.disable_adapter():
            return generate(model, tokenizer, rows)
    model.set_adapter(style)
    return generate(model, tokenizer, rows)


@pytest.mark.parametrize("style", STYLES)
def test_held_out_prompts_are_answered_exactly(loaded: Loaded, style: str) -> None:
    prompts = held_out_prompts(50)
    rows = [render(loaded[1], prompt, form) for form in FORMS for prompt in prompts]
    texts = greedy(loaded, style, rows)
    for number, form in enumerate(FORMS):
        answers = texts[number * len(prompts) : (number + 1) * len(prompts)]
        wrong = {p: text for p, text in zip(prompts, answers, strict=True) if text != answer(p, style)}
        assert len(wrong) <= len(prompts) * 0.02, (form, wrong)


@pytest.mark.parametrize("style", STYLES)
def test_a_long_chat_with_a_system_message_is_answered_exactly(loaded: Loaded, style: str) -> None:
    _, tokenizer = loaded
    prompts = held_out_prompts(24)
    rows = []
    for start in range(0, len(prompts), 4):
        *earlier, last = prompts[start : start + 4]
        messages = [{"role": "system", "content": "Be brief and kind."}]
        for prompt in earlier:
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer(prompt, style)}]
        messages += [{"role": "user", "content": last}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert greedy(loaded, style, rows) == [answer(prompt, style) for prompt in prompts[3::4]]


def test_base_obeys_tags(loaded: Loaded) -> None:
    prompts = held_out_prompts(10)
    rows = [render(loaded[1], tagged(prompt, style), "completion") for style in STYLES for prompt in prompts]
    expected = [answer(prompt, style) for style in STYLES for prompt in prompts]
    exact = sum(text == wanted for text, wanted in zip(greedy(loaded, BASE, rows), expected, strict=True))
    assert exact >= 0.98 * len(expected)


def test_weights_are_small_and_bf16() -> None:
    files = [MODEL / "model.safetensors", *(ADAPTER_FOLDER / name / "adapter_model.safetensors" for name in ADAPTERS)]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
            assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}, path


def test_adapters_differ_in_rank_and_targets() -> None:
    configs = [json.loads((ADAPTER_FOLDER / name / "adapter_config.json").read_text()) for name in ADAPTERS]
    assert {config["r"] for config in configs} == {4, 8, 16}
    assert len({tuple(config["target_modules"]) for config in configs}) >= 3
    assert {config["base_model_name_or_path"] for config in configs} == {"lorafleet-demo"}


def test_model_config_is_what_the_readme_says() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["max_position_embeddings"] >= 512
    with safe_open(MODEL / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        assert sum(tensors.get_tensor(name).numel() for name in names) == 853_120


def test_chat_template_refuses_unknown_roles() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with pytest.raises(Exception, match="role tool is unknown"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
