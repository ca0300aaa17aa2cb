"""The demo's generator: what is deterministic in it reproduces, and training never sees a held-out prompt."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from examples.demo.conversations import IGNORED, Mixture, batches
from examples.demo.evaluate import MODEL
from examples.demo.make import write_base
from examples.demo.tokenizer import EOS, SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer, write_tokenizer
from examples.demo.training import AdapterRecipe, Schedule, base_config, fit, train_adapter, train_base
from examples.demo.words import ADAPTERS, STYLES, answer, held_out_prompts

PROMPT = re.compile(r"\w+, \w+, \w+, \w+")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def test_tokenizer_files_reproduce_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(tokenizer, tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in written:
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


def test_tokenizer_round_trips_every_answer(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    split_characters = 0
    for prompt in held_out_prompts():
        for style in STYLES:
            text = answer(prompt, style)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == text
            split_characters += sum("\ufffd" in tokenizer.decode([token]) for token in ids)
    assert split_characters > 50  # some accented letters take two tokens: streams must hold a half letter back


@pytest.mark.parametrize("style", STYLES)
def test_batches_hold_no_held_out_prompt_and_label_only_answers(tokenizer: Tokenizer, style: str) -> None:
    held_out = set(held_out_prompts())
    questions = 0
    for batch in islice(batches(tokenizer, Mixture(style), rows=32, seed=3), 12):
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
            unlabelled = [token for token, label in zip(tokens, labels, strict=True) if label == IGNORED]
            prompts = PROMPT.findall(tokenizer.decode(unlabelled, skip_special_tokens=False))
            assert not held_out.intersection(prompts)
            expected = "".join(answer(prompt, style) + EOS for prompt in prompts)
            labelled = [label for label in labels if label != IGNORED]
            assert tokenizer.decode(labelled, skip_special_tokens=False) == expected
            questions += len(prompts)
    assert questions > 300


def test_chats_are_written_as_the_chat_template_renders_them(tokenizer: Tokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(MODEL)
    stream = batches(tokenizer, Mixture(tagged_share=0.5), rows=16, seed=5)
    next(stream)  # completions
    for batch in islice(stream, 2):
        for tokens in batch.tokens.tolist():
            text = tokenizer.decode(tokens, skip_special_tokens=False).replace("<pad>", "")
            messages = [
                {"role": role, "content": content} for role, content in re.findall(r"<\|(\w+)\|>(.*?)</s>", text)
            ]
            rendered = reference.apply_chat_template(messages, tokenize=False)
            assert rendered == text
            assert reference(rendered, add_special_tokens=False)["input_ids"] == [t for t in tokens if t]


def test_training_reproduces_from_its_seed_and_learns(tokenizer: Tokenizer) -> None:
    def run(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        model = LlamaForCausalLM(base_config(tokenizer))
        losses = fit(model, tokenizer, Mixture(), Schedule(6, 8, 2e-3, warmup=2), seed)
        return losses, model.state_dict()

    losses, weights = run(7)
    again, weights_again = run(7)
    assert losses == again
    assert all(torch.equal(tensor, weights_again[name]) for name, tensor in weights.items())
    assert losses[-1] < losses[0] - 0.5
    assert run(8)[0] != losses


def test_written_base_is_the_one_that_adapters_train_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = train_base(tokenizer, Schedule(2, 4, 2e-3, warmup=1))
    write_base(base, tokenizer, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(200).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(base(input_ids=tokens).logits, loaded(input_ids=tokens).logits)


@pytest.mark.parametrize("style", ADAPTERS[:1])
def test_adapter_training_reproduces_and_leaves_the_base_alone(tokenizer: Tokenizer, style: str) -> None:
    recipe = AdapterRecipe(style, 4, 8, ("q_proj", "down_proj"), 9, Schedule(3, 8, 5e-3, warmup=1))

    def run() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        base = LlamaForCausalLM(base_config(tokenizer))
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        adapter = train_adapter(base, tokenizer, recipe)
        lora = {name: tensor.clone() for name, tensor in adapter.state_dict().items() if "lora_" in name}
        after = adapter.unload().state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        return lora, before

    lora, _ = run()
    again, _ = run()
    assert len(lora) == 4 * 2 * 2  # layers, targets, A and B
    assert all(torch.equal(tensor, again[name]) for name, tensor in lora.items())
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
