"""Thousands of tiny tenants of the demo model: adapters written as PEFT saves them, and what each must answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from tokenizers import Tokenizer

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE, content_digest, git_blob_sha1
from tests.engine.batched_oracle import BatchedOracle, Pair

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"
NEW = 3  # tokens of each answer
PROMPT = 6  # tokens of each prompt
CERTAIN = 1e-3  # of logits of order 10: by so much every expected token is ahead of the others
_TRIES = 12  # prompts
_AT_ONCE = 250  # rows of the oracle


class Kind(NamedTuple):
    """What tenants of one kind train."""

    rank: int
    targets: tuple[str, ...]
    alpha: int


KINDS = (
    Kind(2, ("q_proj", "v_proj"), 8),
    Kind(8, ("o_proj",), 16),
    Kind(4, ("k_proj", "v_proj", "o_proj"), 6),
    Kind(3, ("q_proj", "down_proj"), 12),
    Kind(12, ("v_proj",), 24),
)


@dataclass(frozen=True, slots=True)
class Tenant:
    """One adapter, what its requests ask, and the one right answer. digest: what a gateway resolves it to."""

    name: str
    kind: Kind
    files: dict[str, bytes]
    digest: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


class Crowd:
    """``count`` tenants ``t0``, ``t1``, ...; the first are asked most."""

    def __init__(self, count: int) -> None:
        self._oracle = BatchedOracle(DEMO)
        self._tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        self._special = {self._tokenizer.token_to_id(content) for content in special}
        self._prompts = self._draw_prompts()
        base = self._oracle.greedy(self._prompts, [{}] * _TRIES, NEW).tokens.tolist()
        self._base = [tuple(tokens) for tokens in base]
        made: dict[int, Tenant] = {}
        for number in range(len(KINDS)):
            made |= self._tenants(range(number, count, len(KINDS)))
        self.tenants = [made[number] for number in range(count)]

    def write(self, folder: Path) -> None:
        """Every tenant's adapter in a sub-folder of its name."""
        for tenant in self.tenants:
            path = folder / tenant.name
            path.mkdir(parents=True)
            for file, data in tenant.files.items():
                (path / file).write_bytes(data)

    def _tenants(self, numbers: Sequence[int]) -> Iterator[tuple[int, Tenant]]:
        """Tenants of one kind. Each has the first prompt, from one that its number chooses on, whose answer is beyond
        doubt and not the base model's."""
        kind = KINDS[numbers[0] % len(KINDS)]
        open_ = {number: self._pairs(kind, number) for number in numbers}
        for attempt in range(_TRIES):
            waiting = list(open_)
            for start in range(0, len(waiting), _AT_ONCE):
                some = waiting[start : start + _AT_ONCE]
                chosen = [(number + attempt) % _TRIES for number in some]
                got = self._oracle.greedy(self._prompts[chosen], [open_[number] for number in some], NEW)
                rows = zip(some, chosen, got.tokens.tolist(), got.margins.tolist(), strict=True)
                for number, prompt, tokens, margin in rows:
                    if margin < CERTAIN or tuple(tokens) == self._base[prompt] or self._special & set(tokens):
                        continue
                    yield number, self._tenant(kind, number, open_.pop(number), prompt, tokens)
        assert not open_, f"{len(open_)} adapters of {kind} have no certain answer of their own"

    def _tenant(self, kind: Kind, number: int, pairs: dict[str, Pair], prompt: int, tokens: Sequence[int]) -> Tenant:
        tensors: dict[str, torch.Tensor] = {}
        for module, (a, b, _) in pairs.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "demo/model",
            "r": kind.rank,
            "lora_alpha": kind.alpha,
            "target_modules": list(kind.targets),
            "bias": "none",
        }
        files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors)}
        digest = content_digest(git_blob_sha1(files[CONFIG_FILE]), hashlib.sha256(files[WEIGHTS_FILE]).hexdigest())
        asked = tuple(self._prompts[prompt].tolist())
        before = self._tokenizer.decode(list(asked))
        text = self._tokenizer.decode([*asked, *tokens]).removeprefix(before)
        return Tenant(f"t{number}", kind, files, digest, asked, tuple(tokens), text)

    def _pairs(self, kind: Kind, number: int) -> dict[str, Pair]:
        generator = torch.Generator().manual_seed(number)
        pairs: dict[str, Pair] = {}
        for module, (inputs, outputs) in self._oracle.linears.items():
            if module.endswith(kind.targets):
                a = torch.randn(kind.rank, inputs, generator=generator) * inputs**-0.5
                b = torch.randn(outputs, kind.rank, generator=generator) * 0.5
                pairs[module] = a, b, kind.alpha / kind.rank
        return pairs

    def _draw_prompts(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(16, self._tokenizer.get_vocab_size(), (_TRIES, PROMPT), generator=generator)
