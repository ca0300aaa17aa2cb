"""Which launch configurations the tuner tries: a small space for each kernel, declared here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kernels.op_configs import default_config

Config = dict[str, int]


@dataclass(frozen=True, slots=True)
class Space:
    """What to try for one kernel.

    choices: values of each key; a key that is not named keeps its default. fits: whether (config, hidden, rank) is
    worth trying.
    ``SPLIT_N`` is given as tiles a program, as the number of programs follows from the width.
    """

    choices: Mapping[str, tuple[int, ...]]
    fits: Callable[[Config, int, int], bool]


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _per_thread(elements: int, config: Config, least: int, most: int) -> bool:
    """A tile that gives each thread so many elements: enough loads in flight, and no spilled registers."""
    return least <= elements / (32 * config["num_warps"]) <= most


def _shared_bytes(config: Config) -> int:
    return 2 * (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * config["num_stages"]


def _fits_shrink(config: Config, hidden: int, rank: int) -> bool:
    one_step = config["BLOCK_K"] >= hidden
    # Along the input a program has one tile.
    tiles = 1 if one_step else -(-rank // config["BLOCK_N"])
    return (
        config["BLOCK_N"] <= _power_of_two(rank)
        and config["BLOCK_K"] <= _power_of_two(hidden)
        and (one_step or config["SPLIT_N"] == tiles)
        and _per_thread(config["BLOCK_N"] * config["BLOCK_K"], config, 8, 64)
    )


def _fits_expand(config: Config, hidden: int, rank: int) -> bool:
    return _per_thread(config["BLOCK_N"] * _power_of_two(rank), config, 8, 128)


_SHRINK = {
    "BLOCK_N": (1, 2, 4),
    "SPLIT_N": (1, 2, 4, 8, 16),
    "BLOCK_K": (512, 1024, 2048, 4096, 8192, 16384),
}

SPACES: dict[str, Space] = {
    "expand": Space(
        {"BLOCK_N": (16, 32, 64, 128, 256, 512, 1024), "SPLIT_N": (1, 2), "num_warps": (1, 2, 4, 8)}, _fits_expand
    ),
    "expand_shared": Space(
        {"BLOCK_N": (16, 32, 64, 128, 256, 512, 1024), "SPLIT_N": (1, 2, 4), "num_warps": (1, 2, 4)}, _fits_expand
    ),
    "shrink": Space(_SHRINK | {"num_warps": (4, 8, 16)}, _fits_shrink),
    "shrink_shared": Space(_SHRINK | {"num_warps": (1, 2, 4, 8)}, _fits_shrink),
    "expand_slices": Space(
        {"BLOCK_N": (64, 128, 256, 512, 1024), "num_warps": (2, 4, 8)},
        lambda config, hidden, rank: _per_thread(config["BLOCK_N"] * config["BLOCK_K"], config, 4, 128),
    ),
    "shrink_slices": Space(
        {"BLOCK_N": (1, 2, 4, 8, 16)}, lambda config, hidden, rank: config["BLOCK_N"] <= _power_of_two(rank)
    ),
    "sgmv_shrink": Space(
        {
            "BLOCK_M": (32, 64, 128),
            "BLOCK_N": (16, 32, 64),
            "BLOCK_K": (64, 128),
            "num_warps": (4, 8),
            "num_stages": (3, 4),
        },
        lambda config, hidden, rank: (
            config["BLOCK_N"] <= max(_power_of_two(rank), 16) and _shared_bytes(config) <= 200 << 10
        ),
    ),
    "sgmv_expand": Space(
        {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (1, 2)},
        lambda config, hidden, rank: 1024 <= config["BLOCK_M"] * config["BLOCK_N"] <= 128 * 128,
    ),
}


def candidates(op: str, hidden: int, rank: int) -> list[Config]:
    """Every configuration to try for one table key, the default first."""
    default, space = default_config(op, hidden, rank), SPACES[op]
    found = [default]
    for values in itertools.product(*space.choices.values()):
        config = default | dict(zip(space.choices, values, strict=True))
        if "SPLIT_N" in space.choices:
            tiles = -(-(hidden if op.startswith("expand") else rank) // config["BLOCK_N"])
            if config["SPLIT_N"] > tiles:
                continue
            config["SPLIT_N"] = -(-tiles // config["SPLIT_N"])
        if config not in found and space.fits(config, hidden, rank):
            found.append(config)
    return found
