"""Checkpoints: every tensor at its place, or a refusal that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.model import DecoderModel
from engine.spec import ModelSpec
from engine.weights import CheckpointError, load_weights, random_weights
from tests.engine.oracle import TinyModel

MakeModel = Callable[..., TinyModel]
Q1 = "model.layers.1.self_attn.q_proj.weight"


def empty_model(path: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    """A model of the checkpoint's shape with every weight NaN, so that one left out shows."""
    model = DecoderModel(ModelSpec.from_dir(path), dtype, "cpu", 16)
    for _, target in model.checkpoint_tensors():
        target.fill_(float("nan"))
    return model


def load(path: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    model = empty_model(path, dtype)
    load_weights(model, path)
    return model


@pytest.fixture
def checkpoint(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint that the test may spoil."""
    return Path(shutil.copytree(tiny_model("llama").path, tmp_path / "model"))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def shard(path: Path) -> dict[str, str]:
    """Split model.safetensors in three with an index, as transformers does for large models."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shard_of = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return shard_of


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 24, "attention_bias": True}),
    ],
)
def test_every_tensor_lands_in_its_part_of_the_packed_ones(
    tiny_model: MakeModel, model_type: str, config: dict[str, Any]
) -> None:
    tiny = tiny_model(model_type, **config)
    model = load(tiny.path)
    expected = dict(tiny.hf.named_parameters())  # a tied lm_head appears once, as the embedding
    targets = dict(model.checkpoint_tensors())
    assert targets.keys() == expected.keys()
    for name, target in targets.items():
        assert torch.equal(target, expected[name]), name
    layer = model.layers[1]
    attention = tiny.hf.model.layers[1].self_attn
    parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    assert torch.equal(layer.qkv.weight, torch.cat(parts))
    assert (model.lm_head is model.embed) == config.get("tie_word_embeddings", False)


def test_shards_load_like_one_file(checkpoint: Path) -> None:
    whole = load(checkpoint)
    assert len(set(shard(checkpoint).values())) == 3
    sharded = load(checkpoint)
    for (name, one), (_, other) in zip(whole.checkpoint_tensors(), sharded.checkpoint_tensors(), strict=True):
        assert torch.equal(one, other), name


def test_dtype_is_cast_and_old_rotary_buffers_are_passed_over(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    tensors = load_file(checkpoint / "model.safetensors")
    model = load(checkpoint, torch.bfloat16)
    assert model.embed.dtype == torch.bfloat16
    assert torch.equal(model.embed, tensors["model.embed_tokens.weight"].bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q1), rf"1 tensors are missing, among them {Q1} \(looked in .*model\.safetensors\)$"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight .*should config\.json say tie_word_embeddings"),
        (lambda t: t.update(extra=torch.ones(1)), r"model\.safetensors holds tensor extra, which the LlamaForCausalLM"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}),
            r"holds tensor model\.layers\.1\.self_attn\.q_proj\.bias",
        ),
        (
            lambda t: t.update({Q1: torch.ones(32, 64)}),
            rf"{Q1} has shape \(32, 64\), but config.json asks for \(64, 64",
        ),
        (lambda t: t.update({Q1: torch.ones(64, 64, dtype=torch.int8)}), rf"{Q1} has dtype torch.int8; quantised"),
        (
            lambda t: t.update({Q1: torch.ones(64, 64).to(torch.float8_e4m3fn)}),
            rf"{Q1} has dtype torch.float8_e4m3fn; quantised",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    checkpoint: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_tied_embeddings_accept_an_equal_head_only(tiny_model: MakeModel, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model("qwen2", tie_word_embeddings=True).path, tmp_path / "model"))
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(path)
    assert model.lm_head is model.embed
    rewrite(path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load(path)


def test_missing_files_are_named(checkpoint: Path) -> None:
    shard_of = shard(checkpoint)
    lost = checkpoint / shard_of[Q1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"{lost.name} does not exist"):
        load(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .*pytorch_model\.bin .*pickle"):
        load(checkpoint)


def test_a_shard_without_a_tensor_of_its_own_is_named(checkpoint: Path) -> None:
    file = checkpoint / shard(checkpoint)[Q1]
    tensors = load_file(file)
    del tensors[Q1]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{Q1} \(looked in .*{file.name}"):
        load(checkpoint)


def test_a_tensor_in_two_shards_is_refused(checkpoint: Path) -> None:
    files = sorted(set(shard(checkpoint).values()))
    first = load_file(checkpoint / files[0])
    second = load_file(checkpoint / files[1])
    name = next(iter(first))
    save_file({**second, name: first[name]}, checkpoint / files[1])
    with pytest.raises(CheckpointError, match=rf"{name} is stored in both .*{files[0]} and .*{files[1]}"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', r"'\.\./secret\.safetensors', which is no file of its own"),
        ('{"metadata": {}}', "is no safetensors index"),
        ("{", "is no safetensors index"),
        ('{"weight_map": {"a": 3}}', "names 3, which is no file of its own"),
        ('{"weight_map": [3]}', "is no safetensors index"),
    ],
)
def test_a_broken_index_is_named(checkpoint: Path, text: str, message: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        load(checkpoint)


def test_random_weights_fill_everything_and_follow_the_seed(checkpoint: Path) -> None:
    models = [empty_model(checkpoint) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        random_weights(model, seed)
    for (name, one), (_, same), (_, other) in zip(*(m.checkpoint_tensors() for m in models), strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, same), name
        assert name.endswith("norm.weight") or not torch.equal(one, other), name
    assert 0.018 < models[0].layers[0].qkv.weight.std() < 0.022
    assert torch.equal(models[0].layers[0].input_norm, torch.ones(64))
