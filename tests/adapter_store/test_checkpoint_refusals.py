"""What cannot be applied whole is refused, under the tenant's name and with the reason."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterRefused
from adapter_store.peft_config import IGNORED_KEYS, READ_KEYS, REFUSED_KEYS, PeftConfig
from tests.adapter_store.peft_adapters import edit_config, edit_tensors, make_adapter, pack, refused, tiny_model

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"use_dora": True}, ("use_dora", "True")),
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save", "lm_head")),
        ({"bias": "all"}, ("bias", "'all'")),
        ({"bias": "lora_only"}, ("bias", "'lora_only'")),
        ({"lora_bias": True}, ("lora_bias", "True")),
        ({"trainable_token_indices": [1, 2]}, ("trainable_token_indices", "[1, 2]")),
        ({"target_modules": ["q_proj", "embed_tokens"]}, ("embed_tokens", "embeddings")),
        ({"target_modules": ["q_proj", "lm_head"]}, ("lm_head", "output head")),
        ({"alora_invocation_tokens": [3, 4]}, ("alora_invocation_tokens",)),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights", "'pissa'", "convert")),
        ({"init_lora_weights": "olora"}, ("init_lora_weights", "'olora'")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_peft_saves_but_we_cannot_honour(tmp_path: Path, config: dict[str, Any], parts: tuple[str, ...]) -> None:
    make_adapter(tmp_path, "qwen2", **config)  # qwen2 has biases
    refused(tmp_path, *parts, architecture="qwen2")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"peft_type": "IA3"}, ("peft_type", "'IA3'")),
        ({"peft_type": ...}, ("peft_type", "None")),
        ({"fan_in_fan_out": True}, ("fan_in_fan_out",)),
        ({"use_qalora": True}, ("use_qalora",)),
        ({"use_bdlora": {"nblocks": 2}}, ("use_bdlora",)),
        ({"arrow_config": {"top_k": 3}}, ("arrow_config",)),
        ({"kasa_config": {"beta": 1}}, ("kasa_config",)),
        ({"monteclora_config": {"n": 1}}, ("monteclora_config",)),
        ({"target_parameters": ["experts.w"]}, ("target_parameters",)),
        ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
        ({"megatron_config": {"a": 1}}, ("megatron_config",)),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, ("init_lora_weights", "'loftq'")),
        ({"init_lora_weights": "corda"}, ("'corda'",)),
        ({"init_lora_weights": "pissa_niter_4"}, ("'pissa_niter_4'",)),
        ({"use_hocus_pocus": 0.5}, ("use_hocus_pocus", "0.5", "not known")),
        ({"r": 0}, ("r is 0",)),
        ({"r": "8"}, ("r is '8'",)),
        ({"r": True}, ("r is True",)),
        ({"r": ...}, ("r is None",)),
        ({"lora_alpha": float("nan")}, ("lora_alpha", "nan")),
        ({"lora_alpha": 10**400}, ("lora_alpha",)),
        ({"lora_alpha": None}, ("lora_alpha", "None")),
        ({"use_rslora": "yes"}, ("use_rslora", "'yes'")),
        ({"rank_pattern": {"q_proj": -1}}, ("rank_pattern['q_proj']", "-1")),
        ({"rank_pattern": ["q_proj"]}, ("rank_pattern",)),
        ({"rank_pattern": {"q_proj(": 4}}, ("'(.*", "q_proj(", "no regular expression")),
        ({"alpha_pattern": {"q_proj": "2"}}, ("alpha_pattern['q_proj']", "'2'")),
        ({"target_modules": None}, ("target_modules is empty",)),
        ({"target_modules": []}, ("target_modules is empty",)),
        ({"target_modules": 7}, ("target_modules", "7")),
        ({"target_modules": ["c_attn"]}, ("q_proj", "target_modules does not name")),
        ({"target_modules": ["q_proj"]}, ("v_proj", "target_modules does not name")),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, ("o_proj", "lora_A and lora_B", "missing")),
        ({"target_modules": "all-linear"}, ("k_proj", "missing")),
        ({"target_modules": "(q_proj"}, ("'(q_proj'", "no regular expression")),
        ({"layers_to_transform": [0, 1]}, ("layers.2", "target_modules does not name")),
        ({"layers_to_transform": ["0"]}, ("layers_to_transform",)),
        ({"layers_pattern": "layers"}, ("layers_pattern", "without layers_to_transform")),
        ({"target_modules": ".*", "layers_to_transform": [0]}, ("layers_to_transform", "pattern")),
        ({"r": 5}, ("lora_A", "layers.0.self_attn.q_proj", "(4, 24)", "(5, 24)")),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else "",
)
def test_configs_that_do_not_fit_their_tensors_or_us(
    tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    make_adapter(tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({f"{Q0}.lora_B.weight": None}, ("layers.0.self_attn.q_proj", "lora_B", "missing")),
        ({f"{Q0}.lora_A.weight": None}, ("layers.0.self_attn.q_proj", "lora_A", "missing")),
        ({f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None}, ("q_proj", "lora_A and lora_B", "missing")),
        ({f"{Q0}.lora_A.weight": torch.ones(4, 23)}, ("(4, 23)", "(4, 24)")),
        ({f"{Q0}.lora_B.weight": torch.ones(24, 5)}, ("(24, 5)", "(24, 4)")),
        ({f"{Q0}.lora_B.weight": torch.ones(24)}, ("(24,)", "(24, 4)")),
        ({f"{Q0}.lora_A.weight": torch.full((4, 24), float("nan"))}, ("lora_A", "q_proj", "NaN")),
        ({f"{Q0}.lora_B.weight": torch.full((24, 4), float("inf"))}, ("lora_B", "q_proj", "infinite")),
        ({f"{Q0}.lora_A.weight": torch.ones(4, 24, dtype=torch.int8)}, ("q_proj", "'I8'")),
        ({f"{Q0}.lora_A.weight": torch.ones(4, 24, dtype=torch.float64)}, ("q_proj", "'F64'")),
        ({f"{Q0}.lora_A.other.weight": torch.ones(4, 24)}, ("q_proj.lora_A", "twice")),
        ({f"{Q0}.lora_magnitude_vector": torch.ones(24)}, ("lora_magnitude_vector", "DoRA")),
        ({f"{Q0}.lora_B.bias": torch.ones(24)}, ("lora_B.bias", "biases")),
        ({"base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight": torch.ones(4, 24)}, ("layers.3", "no mod")),
        ({"base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight": torch.ones(4, 24)}, ("layers.00",)),
        ({"base_model.model.model.norm.weight": torch.ones(24)}, ("model.norm.weight", "no module")),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(32, 24)}, ("embed_tokens", "shared")),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 24)}, ("lm_head", "shared")),
        ({"nonsense": torch.ones(1)}, ("'nonsense'", "no module")),
    ],
    ids=lambda value: next(iter(value)).rsplit(".model.", 1)[-1] if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit(tmp_path: Path, changes: dict[str, Tensor | None], parts: tuple[str, ...]) -> None:
    make_adapter(tmp_path)
    edit_tensors(tmp_path, changes)
    refused(tmp_path, *parts)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    edit_tensors(tmp_path, dict.fromkeys(load_file(tmp_path / WEIGHTS_FILE)))
    refused(tmp_path, "no tensors")


def test_values_that_overflow_the_served_dtype(tmp_path: Path) -> None:
    make_adapter(tmp_path, lora_alpha=400)
    edit_tensors(tmp_path, {f"{Q0}.lora_B.weight": torch.full((24, 4), 6e4)})
    assert pack(tmp_path).slab.isfinite().all()
    refused(tmp_path, "overflow", "float16", dtype=torch.float16)


def test_large_finite_values_are_no_overflow(tmp_path: Path) -> None:
    make_adapter(tmp_path, lora_alpha=4)
    edit_tensors(tmp_path, {f"{Q0}.lora_B.weight": torch.full((24, 4), 3e38)})  # their sum overflows, they do not
    assert pack(tmp_path).slab.isfinite().all()


def test_rank_above_the_largest_class(tmp_path: Path) -> None:
    make_adapter(tmp_path, r=4, rank_pattern={"v_proj": 12})
    refused(tmp_path, "rank 12", "(8)", max_rank=8)
    assert pack(tmp_path, max_rank=12).rank == 12


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -1])
def test_truncated_weights(tmp_path: Path, cut: int) -> None:
    make_adapter(tmp_path)
    file = tmp_path / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:cut])
    refused(tmp_path, WEIGHTS_FILE, "cannot be read")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_weights_never_crash_and_never_pass_as_nan(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / WEIGHTS_FILE
    if not file.exists():
        make_adapter(tmp_path, target_modules=["q_proj"])
        (tmp_path / "good").write_bytes(file.read_bytes())
    damaged = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged), 1200) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        packed = pack(tmp_path)
    except AdapterRefused as error:
        assert error.reason
    else:
        assert packed.slab.isfinite().all()


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "[" * 100_000, '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}"]
)
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    make_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    refused(tmp_path, CONFIG_FILE)


def test_files_that_are_missing_or_pickles(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "pickle", "safetensors")
    (tmp_path / "adapter_model.bin").unlink()
    refused(tmp_path, f"no {WEIGHTS_FILE}")
    (tmp_path / CONFIG_FILE).unlink()
    refused(tmp_path, f"no {CONFIG_FILE}")


def test_files_too_large_are_not_read(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(tmp_path, WEIGHTS_FILE, str(1 << 40))
    make_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(" " * (2 << 20))
    refused(tmp_path, CONFIG_FILE)


@pytest.mark.parametrize(
    ("trained_on", "served", "fits"),
    [
        ("acme/base-8b", "acme/base-8b", True),
        ("acme/base-8b", "/models/base-8b", True),
        ("/home/me/Base-8B/", "acme/base-8b", True),
        ("C:\\models\\base-8b", "acme/base-8b", True),
        ("acme/base-70b", "acme/base-8b", False),
        ("acme/base-8b", "base-8b-instruct", False),
        ("acme/base-70b", "", True),
        ("acme/base-70b", "0123456789abcdef0123456789abcdef01234567", True),
        ("/c/models--acme--base-8b/snapshots/0123456789abcdef0123456789abcdef01234567", "acme/base-8b", True),
        ("/c/models--acme--base-70b/snapshots/0123456789abcdef0123456789abcdef01234567", "acme/base-8b", False),
        ("", "acme/base-8b", True),
        (None, "acme/base-8b", True),
    ],
)
def test_base_model_names(tmp_path: Path, trained_on: str | None, served: str, fits: bool) -> None:
    make_adapter(tmp_path)
    edit_config(tmp_path, base_model_name_or_path=trained_on)
    if fits:
        assert pack(tmp_path, base_model=served).rank == 4
    else:
        refused(tmp_path, str(trained_on), served, base_model=served)


def test_an_adapter_of_a_larger_model_is_refused_by_shape(tmp_path: Path) -> None:
    make_adapter(tmp_path, "qwen3")  # heads of 8 instead of 6
    refused(tmp_path, "shape", "q_proj")


def test_hostile_patterns_are_cut_off(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    started = time.monotonic()
    edit_config(tmp_path, target_modules=r"(?:(?:\w+\.?)+)+!", rank_pattern={r"((.*)*)*!": 4})
    refused(tmp_path, "took over")
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"], rank_pattern={f"a{i}": 4 for i in range(5000)})
    refused(tmp_path, "5000 patterns")
    assert time.monotonic() - started < 30


def test_every_key_of_the_installed_peft_is_classified() -> None:
    """A new PEFT setting must be looked at before adapters that use it are served."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert not fields - (IGNORED_KEYS | READ_KEYS | REFUSED_KEYS.keys())
    assert not (IGNORED_KEYS | READ_KEYS) & REFUSED_KEYS.keys()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", "gaussian", "mica", "eva"])
def test_initialisations_that_change_the_base_weights_are_the_refused_ones(tmp_path: Path, init: str) -> None:
    from peft import get_peft_model

    before = tiny_model("llama").state_dict()
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    after = model.get_base_model().state_dict()
    changed = any(
        not torch.equal(tensor, after[key.replace("q_proj.", "q_proj.base_layer.")]) for key, tensor in before.items()
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    if changed:
        with pytest.raises(ValueError, match="init_lora_weights"):
            PeftConfig.parse(json.dumps(config).encode())
    else:
        assert PeftConfig.parse(json.dumps(config).encode()).r == 4
