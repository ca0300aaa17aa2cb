"""How often the demo model answers exactly, greedily, with transformers and PEFT and nothing of the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.words import ADAPTERS, BASE, STYLES, answer, held_out_prompts

HERE = Path(__file__).parent
MODEL = HERE / "model"
ADAPTER_FOLDER = HERE / "adapters"
FORMS = ("completion", "completion with a newline", "chat")


def load(dtype: torch.dtype, model: Path = MODEL, adapters: Path = ADAPTER_FOLDER) -> tuple[PeftModel, Any]:
    """The base with all four adapters, in `dtype`, and its tokenizer (padding on the left)."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    first, *others = ADAPTERS
    # PEFT would otherwise keep LoRA weights in fp32, whatever the base's dtype.
    tenants = PeftModel.from_pretrained(base, str(adapters / first), adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        tenants.load_adapter(str(adapters / name), adapter_name=name, autocast_adapter_dtype=False)
    return tenants.eval(), tokenizer


def render(tokenizer: Any, prompt: str, form: str) -> list[int]:
    """The token ids that a server feeds for `prompt` in one of FORMS."""
    if form == "chat":
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(prompt + ("\n" if form == "completion with a newline" else ""))["input_ids"]


def generate(model: Any, tokenizer: Any, rows: Sequence[list[int]], max_tokens: int = 64) -> list[str | None]:
    """Greedy text of each row of token ids; None for a row that does not end with the end token in time."""
    padded = tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**padded, do_sample=False, max_new_tokens=max_tokens)
    texts: list[str | None] = []
    for ids in output[:, padded["input_ids"].shape[1] :].tolist():
        ended = tokenizer.eos_token_id in ids
        texts.append(tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]) if ended else None)
    return texts


def accuracy(model: PeftModel, tokenizer: Any, style: str, form: str, prompts: Sequence[str]) -> float:
    """The share of `prompts` answered exactly, by the base or by the adapter of `style`."""
    rows = [render(tokenizer, prompt, form) for prompt in prompts]
    if style == BASE:
        with model.disable_adapter():
            texts = generate(model, tokenizer, rows)
    else:
        model.set_adapter(style)
        texts = generate(model, tokenizer, rows)
    return sum(text == answer(prompt, style) for text, prompt in zip(texts, prompts, strict=True)) / len(prompts)


def main() -> None:
    """Print the table of accuracies on every held-out prompt."""
    torch.set_num_threads(1)
    prompts = held_out_prompts()
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load(dtype)
        for form in FORMS:
            shares = ", ".join(f"{style} {accuracy(model, tokenizer, style, form, prompts):.1%}" for style in STYLES)
            print(f"{str(dtype).removeprefix('torch.'):9s} {form:26s} {shares}", flush=True)


if __name__ == "__main__":
    main()
