"""Builds what an engine runs with: tokenizer, weights, adapter slots and store, and a KV cache of the right size."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapter_store.eviction import eviction_policy
from adapter_store.slots import Residency, SlotPool
from adapter_store.store import AdapterStore
from engine.changed_rows import ChangedRows
from engine.grammar import Grammars
from engine.kv_pages import PagePool
from engine.lora_targets import adapter_layout
from engine.memory_plan import page_bytes
from engine.model import DecoderModel
from engine.rehearsal import rehearse
from engine.runner import Runner
from engine.settings import EngineSettings
from engine.spec import ModelSpec
from engine.step_shapes import StepShape, prefill_buckets, step_shapes
from engine.tokenizer import Tokenizer
from engine.weights import load_weights, random_weights

_log = logging.getLogger(__name__)
_CPU_KV_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A loaded model and everything round it.

    max_model_len: the longest prompt plus completion that the model and the settings allow, in tokens.
    eos_token_ids: tokens that end a completion. store and slots are None when there are no adapter slots, grammars
    without a tokenizer.
    """

    spec: ModelSpec
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    max_model_len: int
    runner: Runner
    pages: PagePool
    slots: SlotPool | None
    store: AdapterStore | None
    grammars: Grammars | None


def build_parts(settings: EngineSettings, on_residency: Callable[[Residency], None] | None) -> EngineParts:
    """Load and allocate everything. Call it on the thread that will run the steps.

    Raises ValueError or FileNotFoundError naming the setting or the file and the remedy.
    """
    started = time.perf_counter()
    device = _device(settings)
    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    spec = ModelSpec.from_dir(settings.model)
    if settings.model_name is not None:
        spec = replace(spec, name=settings.model_name)
    tokenizer = _tokenizer(settings)
    dtype = dtype_on(settings, device)
    max_model_len = spec.context(settings.max_model_len)
    model = DecoderModel(spec, dtype, device, max_model_len)
    if settings.load_random_weights:
        random_weights(model, settings.seed or 0)
    else:
        load_weights(model, settings.model)
    slots, store = _adapters(settings, spec, dtype, device, on_residency)
    changed = ChangedRows(settings.max_rows, spec.vocab_size, device, poison=settings.poison)
    runner = Runner(
        model, model.new_kv_cache(1, settings.page_size), slots, settings.max_batch_tokens + settings.max_rows, changed
    )
    activation_bytes = graph_bytes = 0
    if device.type == "cuda":
        activation_bytes = _step_bytes(runner, settings, max_model_len)
        if settings.cuda_graphs:
            graph_bytes = _graph_bytes(runner, settings, max_model_len)
    num_pages = _num_pages(settings, model, max_model_len, activation_bytes + graph_bytes)
    runner.kv = model.new_kv_cache(num_pages, settings.page_size)
    if graph_bytes:
        _capture(runner, settings, max_model_len, _captured_shapes(settings))
    pages = PagePool(num_pages, settings.page_size, runner.poison if settings.poison else None)
    if settings.poison:
        runner.poison(range(num_pages))
    _log.info(
        "%s on %s in %s: weights %s, adapter slots %s (%s), KV cache %s (%d tokens in pages of %d), "
        "one step %s, CUDA graphs %s (%d); ready in %.1f s",
        spec.name,
        device,
        str(dtype).removeprefix("torch."),
        _size(sum(target.nbytes for _, target in model.checkpoint_tensors())),
        _size(0 if slots is None else slots.arena.nbytes),
        ", ".join(f"{count} of rank {rank}" for rank, count in settings.slots) or "none",
        _size(num_pages * page_bytes(spec, settings.page_size, dtype)),
        num_pages * settings.page_size,
        settings.page_size,
        _size(activation_bytes) if activation_bytes else "not measured",
        _size(graph_bytes),
        0 if runner.graphs is None else len(runner.graphs),
        time.perf_counter() - started,
    )
    eos = {*spec.eos_token_ids, *(() if tokenizer is None else tokenizer.eos_token_ids)}
    grammars = None if tokenizer is None else Grammars(tokenizer, spec.vocab_size, tuple(eos))
    return EngineParts(spec, tokenizer, frozenset(eos), max_model_len, runner, pages, slots, store, grammars)


def _device(settings: EngineSettings) -> torch.device:
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but torch sees no GPU: check the driver, or set device to 'cpu'")
    return torch.device("cuda", torch.cuda.current_device())


def dtype_on(settings: EngineSettings, device: torch.device) -> torch.dtype:
    """What weights, activations and adapters are kept in on such a device, be there one here or not."""
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, settings.dtype)


def _tokenizer(settings: EngineSettings) -> Tokenizer | None:
    """A benchmark with random weights may have a config.json alone; nothing else goes without a tokenizer."""
    if settings.load_random_weights and not (Path(settings.model) / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_dir(settings.model)


def _adapters(
    settings: EngineSettings,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    on_residency: Callable[[Residency], None] | None,
) -> tuple[SlotPool | None, AdapterStore | None]:
    if not settings.slots:
        return None, None
    layout = adapter_layout(spec)

    def changed(residency: Residency) -> None:
        if on_residency is None:
            return
        try:
            on_residency(residency)
        except Exception:  # a listener's fault must not end the requests of everybody
            _log.exception("the listener for residency news failed")

    policy = eviction_policy(settings.eviction)
    classes = dict(settings.slots)
    slots = SlotPool(layout, classes, dtype, device, eviction=policy(), poison=settings.poison, on_change=changed)
    cuda = device.type == "cuda"
    store = AdapterStore(settings.store, layout, dtype, settings.max_rank, pin_memory=cuda, eviction=policy())
    return slots, store


def _num_pages(settings: EngineSettings, model: DecoderModel, max_model_len: int, activation_bytes: int) -> int:
    """The setting, else what fits: never more than every row can use, on a CPU at most 1 GiB."""
    if settings.num_pages is not None:
        return settings.num_pages
    size = page_bytes(model.spec, settings.page_size, model.dtype)
    one_context = -(-max_model_len // settings.page_size)
    if model.device.type == "cpu":
        room = max(_CPU_KV_BYTES // size, one_context)
    else:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(model.device)
        room = int((free - activation_bytes) * settings.kv_memory_fraction) // size
        if room < 1:
            raise ValueError(
                f"no GPU memory is left for the KV cache: of {_size(total)}, {_size(free)} are free after weights and "
                f"slots, and a step takes {_size(activation_bytes)}: lower slots, max_batch_tokens or max_rows"
            )
    pages = min(room, settings.max_rows * one_context)
    if pages < one_context:
        _log.warning(
            "the KV cache holds %d tokens, less than the context of %d: longer requests are refused",
            pages * settings.page_size,
            max_model_len,
        )
    return pages


def _step_bytes(runner: Runner, settings: EngineSettings, max_model_len: int) -> int:
    """Most GPU memory that a step takes beside weights, slots and KV cache; compiles the kernels on the way."""
    device = runner.model.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    rehearse(runner, settings, max_model_len)
    return torch.cuda.max_memory_allocated(device) - before


def _graph_bytes(runner: Runner, settings: EngineSettings, max_model_len: int) -> int:
    """GPU memory that the captured steps will hold, by the largest of them and what the next few add to it.

    They are captured over the real KV cache later, which is made of the memory that they leave.
    """
    device = runner.model.device
    shapes = _captured_shapes(settings)
    few = min(4, len(shapes))
    held: list[int] = []
    for count in (1, few):
        runner.graphs = None
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(device)
        _capture(runner, settings, max_model_len, shapes[:count])
        held.append(before - torch.cuda.mem_get_info(device)[0])
    runner.graphs = None
    largest, together = held
    return max(largest + max(together - largest, 0) * (len(shapes) - 1) // max(few - 1, 1), 1)


def _captured_shapes(settings: EngineSettings) -> list[StepShape]:
    prompts = settings.graph_prefill_tokens
    if prompts is None:
        prompts = prefill_buckets(settings.max_batch_tokens)
    return step_shapes(settings.max_rows, prompts, settings.max_mixed_tokens)


def _capture(runner: Runner, settings: EngineSettings, max_model_len: int, shapes: Sequence[StepShape]) -> None:
    runner.capture(shapes, -(-max_model_len // settings.page_size))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
