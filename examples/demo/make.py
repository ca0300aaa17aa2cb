"""Train the demo's tokenizer, base model and adapters from fixed seeds: `python -m examples.demo.make [folder]`."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from examples.demo.tokenizer import BOS, EOS, PAD, train_tokenizer, write_tokenizer
from examples.demo.training import ADAPTER_RECIPES, BASE_NAME, train_adapter, train_base


def write_base(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bf16)."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    generation = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "do_sample": False,
        "max_new_tokens": 64,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors (bf16) as PEFT names them."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = model.peft_config["default"]
    assert isinstance(trained, LoraConfig)
    # Only the keys that every version of PEFT knows, in a fixed order.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "r": trained.r,
        "lora_alpha": trained.lora_alpha,
        "target_modules": sorted(trained.target_modules or ()),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def make_adapters(base: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Train every adapter over `base` and write each to its own sub-folder."""
    for recipe in ADAPTER_RECIPES:
        print(f"adapter {recipe.style}: rank {recipe.rank}, {', '.join(recipe.targets)}", flush=True)
        adapter = train_adapter(base, tokenizer, recipe)
        write_adapter(adapter, folder / recipe.style)
        base = adapter.unload()
        assert isinstance(base, LlamaForCausalLM)


def main(folder: Path) -> None:
    started = time.perf_counter()
    model_folder = folder / "model"
    model_folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    write_tokenizer(tokenizer, model_folder)
    print("base model", flush=True)
    base = train_base(tokenizer)
    write_base(base, tokenizer, model_folder)
    make_adapters(base, tokenizer, folder / "adapters")
    print(f"written to {folder} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
