"""Models and adapters of real shapes with random weights, written as the files the engine reads."""

from __future__ import annotations

import itertools
import json
import os
import random
import string
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from adapter_store.layout import AdapterLayout

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # for a look at the benchmarks themselves on a CPU
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}


def write_model_config(folder: Path, shape: str, positions: int = 0) -> Path:
    """Write ``config.json`` of a known shape (weights are drawn by the engine) and return the folder.

    positions: the longest context, where the shape's own is shorter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = SHAPES[shape]
    config = own | {"max_position_embeddings": max(positions, own["max_position_embeddings"])}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_random_adapter(folder: Path, layout: AdapterLayout, rank: int, seed: int, spread: float = 0.02) -> Path:
    """Write a PEFT LoRA folder of one rank over every target module, bf16, random A and B of this deviation."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU draws the gigabytes of a benchmark in no time
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path, _, group, index in layout.modules():
        module = group.modules[index]
        for half, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, spread, generator=generator)
            tensors[f"base_model.model.{path}.lora_{half}.weight"] = weight.cpu()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": layout.base_model,
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted({module.name for group in layout.groups for module in group.modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_random_adapters(folder: Path, layout: AdapterLayout, ranks: Mapping[str, int]) -> None:
    """Write an adapter of each name and rank below ``folder``, the n-th with seed n. Those that are there stay."""

    def write(number: int, name: str) -> None:
        if not (folder / name).exists():
            write_random_adapter(folder / name, layout, ranks[name], number)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as writers:
        list(writers.map(write, itertools.count(), ranks))


def write_random_tokenizer(model: Path, seed: int = 0) -> None:
    """Give a model folder a byte-level ``tokenizer.json`` of random words, as wide as its logits.

    Text cannot be encoded well with it (it has no merges); tokens have texts, as long as a real vocabulary's.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    special = {config["bos_token_id"]: "<|begin|>", config["eos_token_id"]: "<|end|>"}
    rng = random.Random(seed)
    letters = string.ascii_lowercase * 8 + string.ascii_uppercase + string.digits + string.punctuation
    words = dict.fromkeys(sorted(ByteLevel.alphabet()))
    while len(words) < config["vocab_size"]:
        space = "\u0120" if rng.random() < 0.5 else ""  # how a byte-level vocabulary writes a blank
        words[space + "".join(rng.choices(letters, k=rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 7, 9))))] = None
    texts = iter(words)
    vocab = {special.get(token) or next(texts): token for token in range(config["vocab_size"])}
    backend = Tokenizer(BPE(vocab, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([*special.values()])
    backend.save(str(model / "tokenizer.json"))
