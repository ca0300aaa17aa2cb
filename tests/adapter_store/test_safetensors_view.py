"""Our reading of safetensors against the library's."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from adapter_store.safetensors_view import DTYPES, view_safetensors


def bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99)),
    max_size=5,
)


def build(spec: dict[str, tuple[str, list[int], int]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])
        for name, (dtype, shape, seed) in spec.items()
    }


@given(spec=_TENSORS, metadata=st.none() | st.just({"format": "pt"}))
def test_reads_what_the_library_writes(
    spec: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None
) -> None:
    tensors = build(spec)
    data = save(tensors, metadata)
    read = view_safetensors(bytes_tensor(data))
    assert read.keys() == tensors.keys() == load(data).keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@settings(max_examples=300)
@given(spec=_TENSORS, data=st.data())
def test_refuses_what_the_library_refuses(spec: dict[str, tuple[str, list[int], int]], data: st.DataObject) -> None:
    damaged = bytearray(save(build(spec)))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        expected = load(bytes(damaged))
    except (safetensors.SafetensorError, KeyError, AssertionError, RuntimeError, ValueError):
        expected = None
    try:
        read = view_safetensors(bytes_tensor(bytes(damaged)))
    except ValueError:
        return  # stricter than the library is fine: other dtypes, odd shapes
    assert expected is not None, "the library refuses this file"
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        raw, other = (one.reshape(-1).view(torch.uint8) for one in (tensor, expected[name]))
        assert torch.equal(raw, other)


def test_tensors_are_views_and_misaligned_ones_are_right_too() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0)}
    data = bytes_tensor(save(tensors))
    inside = range(data.data_ptr(), data.data_ptr() + data.numel())
    assert all(tensor.data_ptr() in inside for tensor in view_safetensors(data).values())
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
    }
    payload = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    for padding in range(4):
        text = json.dumps(header).encode() + b" " * padding
        read = view_safetensors(bytes_tensor(file(text, payload)))
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "only 0 bytes"),
        (b"\x01" * 7, "only 7 bytes"),
        (struct.pack("<Q", 1 << 63), "does not fit"),
        (struct.pack("<Q", 100) + b"{}", "does not fit"),
        (file(b"{"), "not valid"),
        (file(b"\xff\xfe"), "not valid"),
        (file(b"[" * 50_000), "not valid"),
        (file([1]), "no object"),
        (file({"a": 1}), "'a' is no object"),
        (file(b'{"a": {}, "a": {}}'), "twice"),
        (file({"a": {**ENTRY, "dtype": "I64"}}, b"x" * 8), "'I64'; only F32"),
        (file({"a": {**ENTRY, "dtype": ["F32"]}}, b"x" * 8), "only F32"),
        (file({"a": {**ENTRY, "shape": [3]}}, b"x" * 8), "takes 8 bytes"),
        (file({"a": {**ENTRY, "shape": [-2]}}, b"x" * 8), "shape"),
        (file({"a": {**ENTRY, "shape": [True, 2]}}, b"x" * 8), "shape"),
        (file({"a": {**ENTRY, "shape": None}}, b"x" * 8), "shape"),
        (file({"a": {**ENTRY, "data_offsets": [0]}}, b"x" * 8), "offsets"),
        (file({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"x" * 8), "takes -8 bytes"),
        (file({"a": {**ENTRY, "data_offsets": [0.0, 8.0]}}, b"x" * 8), "offsets"),
        (file({"a": ENTRY}, b"x" * 7), "ends at byte 8 of 7"),
        (file({"a": ENTRY}, b"x" * 9), "1 bytes that belong to no tensor"),
        (file({"a": ENTRY, "b": ENTRY}, b"x" * 8), "hole or overlap at byte 8"),
        (file({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"x" * 12), "hole or overlap at byte 0"),
    ],
)
def test_what_is_no_safetensors_file(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("[", r"\[")):
        view_safetensors(bytes_tensor(data))
