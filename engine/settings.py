"""How one engine runs: parsed once at the edge, frozen afterwards. The engine reads no environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal, get_args

from adapter_store.eviction import EVICTION_NAMES, EvictionName
from adapter_store.settings import StoreSettings

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class EngineSettings:
    """Everything an ``Engine`` needs to know.

    model: a directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``.
    model_name: what adapters call the model they were trained for; None takes the directory's name.
    dtype: "auto" is float32 on a CPU, bfloat16 on CUDA. device: "auto" is CUDA when there is one.
    max_model_len: longest prompt plus completion in tokens; None takes the model's own context.
    page_size: tokens a KV page. num_pages: KV pages; None sizes the cache from free GPU memory, or on a CPU
    from ``max_rows`` full contexts, at most 1 GiB.
    kv_memory_fraction: share of the GPU memory left after weights, slots and one full step that KV may take.
    max_rows: most requests in one step. max_batch_tokens: most tokens in one step (prefill chunk budget).
    max_mixed_tokens: most prefill tokens in a step in which other rows decode, and wait for it; more by as much as
    more rows wait for their first token than decode.
    prefix_cache: requests of one adapter whose tokens begin alike compute the common part once.
    max_waiting: requests beyond ``max_rows`` that may queue; one more raises EngineOverloaded.
    slots: adapter slots as ``{rank: count}`` (a mapping or pairs), each holding one adapter up to that rank.
    store: where adapters come from and how many bytes of them stay in host memory.
    load_threads: adapters on this machine that are read and packed at the same time. download_threads: adapters
    brought here from elsewhere at the same time, at most a quarter of them of one owner (a Hub organisation, a bucket).
    max_overtakes: requests that may pass one that waits for an adapter slot before a slot is drained for it, and the
    first one that waits of a tenant before it is first of all.
    eviction: which adapter leaves a slot or host memory for another: "cost" the one used least, where uses fade with
    time, and in host memory also what is large for the time it took to load; "lru" the one not used for longest. Pinned
    ones never do.
    input_weight, output_weight: what a token of a prompt and a generated one count for the tenant; who has had least is
    next. tenant_weights: shares of tenants that are to get more (or less) than 1. A tenant is what a request says, else
    its adapter's name.
    cuda_graphs: on a GPU, decode steps are captured at the start and replayed, padded to some numbers of rows.
    graph_prefill_tokens: numbers of prompt tokens that steps with prompts are captured for; None takes them up to
    ``max_batch_tokens``. A step that fits none is launched kernel by kernel, which takes the host tens of milliseconds.
    cpu_threads: torch threads of the step loop; None leaves torch's choice.
    seed: draws the seeds of requests without one, and the weights of ``load_random_weights``; None is random.
    load_random_weights: benchmark with ``config.json`` alone.
    poison: fill freed pages and slots with NaN, which proves that nothing reads them (tests, debugging).

    Raises ValueError naming the field, its value and the remedy.
    """

    model: str
    model_name: str | None = None
    dtype: DType = "auto"
    device: Device = "auto"
    max_model_len: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    kv_memory_fraction: float = 0.9
    max_rows: int = 64
    max_batch_tokens: int = 2048
    max_mixed_tokens: int = 256
    prefix_cache: bool = True
    max_waiting: int = 256
    slots: tuple[tuple[int, int], ...] = ((16, 32), (64, 4))
    store: StoreSettings = field(default_factory=StoreSettings)
    load_threads: int = 4
    download_threads: int = 32
    max_overtakes: int = 64
    eviction: EvictionName = "cost"
    input_weight: float = 1.0
    output_weight: float = 2.0
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    cuda_graphs: bool = True
    graph_prefill_tokens: tuple[int, ...] | None = None
    cpu_threads: int | None = None
    seed: int | None = None
    load_random_weights: bool = False
    poison: bool = False

    def __post_init__(self) -> None:
        written = self.slots
        pairs = written.items() if isinstance(written, Mapping) else written
        try:
            slots = tuple(sorted((int(rank), int(count)) for rank, count in pairs))
        except (TypeError, ValueError) as error:
            raise ValueError(f"slots is {written!r}: write ranks and counts, such as {{16: 32, 64: 4}}") from error
        object.__setattr__(self, "slots", slots)
        if self.graph_prefill_tokens is not None:
            object.__setattr__(self, "graph_prefill_tokens", tuple(self.graph_prefill_tokens))
        ranks = [rank for rank, _ in slots]
        at_least_one = (
            "page_size",
            "max_rows",
            "max_batch_tokens",
            "max_mixed_tokens",
            "load_threads",
            "download_threads",
        )
        optional = ("max_model_len", "num_pages", "cpu_threads")
        checks: list[tuple[str, bool, str]] = [
            ("model", bool(self.model), "the path of a model directory"),
            ("dtype", self.dtype in get_args(DType), f"one of {', '.join(get_args(DType))}"),
            ("device", self.device in get_args(Device), f"one of {', '.join(get_args(Device))}"),
            *((name, getattr(self, name) >= 1, "1 or more") for name in at_least_one),
            *(
                (name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more, or unset")
                for name in optional
            ),
            (
                "graph_prefill_tokens",
                all(0 < tokens <= self.max_batch_tokens for tokens in self.graph_prefill_tokens or ()),
                f"numbers between 1 and max_batch_tokens ({self.max_batch_tokens})",
            ),
            ("max_waiting", self.max_waiting >= 0, "0 or more"),
            ("max_overtakes", self.max_overtakes >= 0, "0 or more"),
            ("eviction", self.eviction in EVICTION_NAMES, f"one of {', '.join(EVICTION_NAMES)}"),
            ("input_weight", 0.0 < self.input_weight < inf, "above 0"),
            ("output_weight", 0.0 < self.output_weight < inf, "above 0"),
            ("tenant_weights", all(0.0 < share < inf for share in self.tenant_weights.values()), "shares above 0"),
            ("kv_memory_fraction", 0.0 < self.kv_memory_fraction <= 1.0, "above 0 and at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2**63 - 1, or unset"),
            ("slots", all(rank >= 1 and count >= 1 for rank, count in slots), "ranks and counts of 1 or more"),
            ("slots", len(set(ranks)) == len(ranks), "one count for each rank: add up the counts of a repeated rank"),
            (
                "max_batch_tokens",
                self.max_batch_tokens >= self.max_rows,
                f"at least max_rows ({self.max_rows}), one token for each running row: raise it or lower max_rows",
            ),
        ]
        for name, ok, allowed in checks:
            if not ok:
                value = written if name == "slots" else getattr(self, name)
                raise ValueError(f"{name} is {value!r} but must be {allowed}")

    @property
    def max_rank(self) -> int:
        """The largest adapter rank that fits a slot; 0 when no adapters are served."""
        return max((rank for rank, _ in self.slots), default=0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineSettings:
        """Settings from parsed YAML or JSON; an unknown key raises ValueError naming it."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown engine settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)
