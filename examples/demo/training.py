"""Training of the demo's base model (transformers' Llama) and of its LoRA adapters (PEFT), seeded, on one thread."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from examples.demo.conversations import IGNORED, Mixture, batches
from examples.demo.tokenizer import BOS, EOS, MAX_POSITIONS, PAD

BASE_NAME = "lorafleet-demo"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Schedule:
    """`steps` optimizer steps of `rows` rows each: linear warm-up, then a cosine from `rate` to zero."""

    steps: int
    rows: int
    rate: float
    warmup: int = 20
    weight_decay: float = 0.0

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


@dataclass(frozen=True)
class AdapterRecipe:
    """One adapter: the style it makes the default, its LoRA shape and how it is trained."""

    style: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    seed: int
    schedule: Schedule


BASE_SEED = 1
BASE_SCHEDULE = Schedule(steps=1500, rows=64, rate=4e-3, warmup=40, weight_decay=0.05)
BASE_MIXTURE = Mixture(tagged_share=0.6)
ADAPTER_RECIPES = (
    AdapterRecipe("shout", 4, 8, (*ATTENTION, "up_proj", "down_proj"), 2, Schedule(600, 32, 8e-3)),
    AdapterRecipe("json", 8, 16, ATTENTION, 3, Schedule(300, 32, 8e-3)),
    AdapterRecipe("spanish", 16, 32, ATTENTION + MLP, 4, Schedule(600, 32, 5e-3)),
    AdapterRecipe("mirror", 16, 16, ("v_proj", "o_proj", *MLP), 5, Schedule(300, 32, 5e-3)),
)


def base_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )


def train_base(tokenizer: Tokenizer, schedule: Schedule = BASE_SCHEDULE) -> LlamaForCausalLM:
    """Train the base model in fp32 and round its weights to bf16; it stays an fp32 module, for adapters to train on."""
    torch.manual_seed(BASE_SEED)
    model = LlamaForCausalLM(base_config(tokenizer))
    fit(model, tokenizer, BASE_MIXTURE, schedule, BASE_SEED)
    with torch.no_grad():
        for parameter in model.parameters():  # not Module.bfloat16(): that would round RoPE's frequencies too
            parameter.copy_(parameter.bfloat16())
    return model


def train_adapter(base: LlamaForCausalLM, tokenizer: Tokenizer, recipe: AdapterRecipe) -> PeftModel:
    """Train one adapter over the frozen `base`; `.unload()` of the result gives `base` back untouched."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=list(recipe.targets),
    )
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    fit(model, tokenizer, Mixture(default_style=recipe.style), recipe.schedule, recipe.seed)
    return model


def fit(model: torch.nn.Module, tokenizer: Tokenizer, mixture: Mixture, schedule: Schedule, seed: int) -> list[float]:
    """Train the parameters of `model` that require a gradient; returns the loss of every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of additions, and so the result, depends on the number of threads
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    stream = batches(tokenizer, mixture, schedule.rows, seed)
    losses: list[float] = []
    started = time.perf_counter()
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        batch = next(stream)
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        targets = batch.labels[:, 1:].flatten()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1:4d}  loss {losses[-1]:.5f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    torch.set_num_threads(threads)
    return losses
