"""The demo's vocabulary: exact answers, refusals by name, and the split that keeps held-out prompts out of training."""

from __future__ import annotations

from collections import Counter

import pytest

from examples.demo.words import SLOTS, STYLES, all_prompts, answer, held_out_prompts, tagged, words_of

EXPECTED = {
    "base": "The old robot eats in the school.",
    "shout": "THE OLD ROBOT EATS IN THE SCHOOL!",
    "json": '{"who": "robot", "how": "old", "does": "eats", "where": "school"}',
    "spanish": "robot viejo come en escuela.",
    "mirror": "ehT dlo tobor stae ni eht loohcs.",
}


@pytest.mark.parametrize("style", STYLES)
def test_answer_is_exact(style: str) -> None:
    assert answer("robot, old, eats, school", style) == EXPECTED[style]
    assert answer(" robot,old ,eats, school\n", style) == EXPECTED[style]


def test_spanish_keeps_its_accents() -> None:
    assert answer("boy, strange, teaches, mountain", "spanish") == "niño extraño enseña en montaña."


@pytest.mark.parametrize(
    ("prompt", "style", "named"),
    [
        ("robot, old, eats", "base", "3 words"),
        ("robot, old, eats, moon", "json", "'moon' is no place"),
        ("old, robot, eats, school", "base", "'old' is no noun"),
        ("robot, old, eats, school", "french", "'french' is no style"),
    ],
)
def test_refusals_name_the_value(prompt: str, style: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        answer(prompt, style)


def test_every_prompt_has_five_different_answers() -> None:
    for prompt in held_out_prompts():
        assert len({answer(prompt, style) for style in STYLES}) == len(STYLES)


def test_held_out_prompts_are_distinct_and_cover_the_vocabulary() -> None:
    prompts = held_out_prompts()
    assert len(set(prompts)) == len(prompts) == 200
    assert set(prompts) <= set(all_prompts())
    assert held_out_prompts(50) == prompts[:50]
    seen = Counter(word for prompt in prompts for word in words_of(prompt))
    assert all(seen[word] for slot in SLOTS for word in slot)


def test_held_out_prompts_are_the_same_everywhere() -> None:
    assert held_out_prompts(3) == [
        "shark, happy, reads, garden",
        "baker, lazy, jumps, castle",
        "penguin, tall, sings, forest",
    ]


@pytest.mark.parametrize("count", [-1, 201])
def test_held_out_count_is_checked(count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count}"):
        held_out_prompts(count)


def test_tagged_prompt() -> None:
    assert tagged("robot, old, eats, school", "shout") == "shout: robot, old, eats, school"
