"""The right answers of many adapters at once: a transformers model in which every row has an adapter of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank) and the scale alpha / rank


@dataclass(frozen=True, slots=True)
class Greedy:
    """tokens: (rows, new). margins: (rows,) the least by which a token was ahead of the next likeliest."""

    tokens: Tensor
    margins: Tensor


class BatchedOracle:
    """Shares nothing with the engine: transformers' own model in fp32, no cache, no pages, no slots."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        self._model = model.eval()
        #: path -> (in, out) of every linear layer, as adapters name them.
        self.linears: dict[str, tuple[int, int]] = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if name.endswith("_proj")
        }

    def greedy(self, prompts: Tensor, adapters: Sequence[Mapping[str, Pair]], new: int) -> Greedy:
        """prompts: (rows, length) int64. adapters: of each row, by module; rows target the same modules, at one rank;
        nothing at all is the base model."""
        stacked = {
            module: (
                torch.stack([adapter[module][0] for adapter in adapters]),
                torch.stack([adapter[module][1] * adapter[module][2] for adapter in adapters]),
            )
            for module in adapters[0]
        }
        hooks = [
            self._model.get_submodule(module).register_forward_hook(_add(a, b)) for module, (a, b) in stacked.items()
        ]
        try:
            tokens, margins = prompts, torch.full((len(prompts),), torch.inf)
            with torch.inference_mode():
                for _ in range(new):
                    logits = self._model(tokens, use_cache=False).logits[:, -1].float()
                    (first, second), ids = logits.topk(2).values.unbind(1), logits.argmax(1)
                    margins = torch.minimum(margins, first - second)
                    tokens = torch.cat((tokens, ids[:, None]), dim=1)
        finally:
            for hook in hooks:
                hook.remove()
        return Greedy(tokens[:, prompts.shape[1] :], margins)


def _add(a: Tensor, b: Tensor) -> Any:
    def hook(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        del module
        return output + inputs[0] @ a.transpose(1, 2) @ b.transpose(1, 2)

    return hook
