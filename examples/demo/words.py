"""The demo's vocabulary and the exact text that each of its five models must answer.

A prompt is four words, `noun, adjective, verb, place`. The base model turns it into a sentence and every adapter
renders the same sentence in a style of its own. Each answer is a pure function of the prompt, so a test can assert the
text of every tenant to the character. This module needs the standard library alone.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator

BASE = "base"
ADAPTERS = ("shout", "json", "spanish", "mirror")
STYLES = (BASE, *ADAPTERS)

# English word -> Spanish word. Every noun is masculine in Spanish, so that no adjective needs to agree.
NOUNS = {
    "robot": "robot",
    "cat": "gato",
    "dog": "perro",
    "boy": "niño",
    "lion": "león",
    "dragon": "dragón",
    "bird": "pájaro",
    "owl": "búho",
    "mouse": "ratón",
    "penguin": "pingüino",
    "fox": "zorro",
    "bear": "oso",
    "horse": "caballo",
    "doctor": "médico",
    "painter": "pintor",
    "king": "rey",
    "captain": "capitán",
    "thief": "ladrón",
    "baker": "panadero",
    "clown": "payaso",
    "cowboy": "vaquero",
    "camel": "camello",
    "tiger": "tigre",
    "wolf": "lobo",
    "donkey": "burro",
    "dolphin": "delfín",
    "shark": "tiburón",
    "uncle": "tío",
    "neighbor": "vecino",
    "student": "alumno",
}
ADJECTIVES = {
    "old": "viejo",
    "young": "joven",
    "small": "pequeño",
    "tall": "alto",
    "happy": "feliz",
    "sad": "triste",
    "fast": "rápido",
    "slow": "lento",
    "shy": "tímido",
    "strange": "extraño",
    "brave": "valiente",
    "lazy": "perezoso",
    "clever": "listo",
    "rich": "rico",
    "green": "verde",
    "hungry": "hambriento",
}
VERBS = {
    "eats": "come",
    "sleeps": "duerme",
    "runs": "corre",
    "sings": "canta",
    "dances": "baila",
    "reads": "lee",
    "dreams": "sueña",
    "works": "trabaja",
    "swims": "nada",
    "teaches": "enseña",
    "laughs": "ríe",
    "cries": "llora",
    "waits": "espera",
    "plays": "juega",
    "cooks": "cocina",
    "jumps": "salta",
}
PLACES = {
    "school": "escuela",
    "garden": "jardín",
    "kitchen": "cocina",
    "forest": "bosque",
    "city": "ciudad",
    "mountain": "montaña",
    "cafe": "café",
    "castle": "castillo",
    "cabin": "cabaña",
    "museum": "museo",
    "bus": "autobús",
    "library": "biblioteca",
}
SLOTS = (NOUNS, ADJECTIVES, VERBS, PLACES)
_SLOT_NAMES = ("noun", "adjective", "verb", "place")

HELD_OUT = 200
_SPLIT_SEED = 20_240_501


def words_of(prompt: str) -> tuple[str, str, str, str]:
    """Split `"robot, old, eats, school"` into its four words; white space around words does not matter.

    Raises ValueError when the prompt has another number of words, or names a word outside the vocabulary.
    """
    words = [word.strip() for word in prompt.split(",")]
    if len(words) != len(SLOTS):
        raise ValueError(f"prompt {prompt!r} has {len(words)} words; write four: noun, adjective, verb, place")
    for word, slot, name in zip(words, SLOTS, _SLOT_NAMES, strict=True):
        if word not in slot:
            raise ValueError(f"{word!r} is no {name} of the demo; choose one of: {', '.join(slot)}")
    noun, adjective, verb, place = words
    return noun, adjective, verb, place


def answer(prompt: str, style: str = BASE) -> str:
    """The exact text the model must generate for `prompt` in `style` (one of STYLES; an adapter's name is its style).

    Raises ValueError for an unknown style, or a prompt that `words_of` refuses.
    """
    noun, adjective, verb, place = words_of(prompt)
    sentence = f"The {adjective} {noun} {verb} in the {place}."
    if style == BASE:
        return sentence
    if style == "shout":
        return sentence[:-1].upper() + "!"
    if style == "json":
        return json.dumps({"who": noun, "how": adjective, "does": verb, "where": place})
    if style == "spanish":
        return f"{NOUNS[noun]} {ADJECTIVES[adjective]} {VERBS[verb]} en {PLACES[place]}."
    if style == "mirror":
        return " ".join(word[::-1] for word in sentence[:-1].split()) + "."
    raise ValueError(f"{style!r} is no style of the demo; choose one of: {', '.join(STYLES)}")


def tagged(prompt: str, style: str) -> str:
    """The prompt that asks the base model for `style` by name, such as `"shout: robot, old, eats, school"`.

    The base model learns the styles from tagged prompts, so that an adapter only has to change the default style.
    """
    return f"{style}: {prompt}"


def all_prompts() -> Iterator[str]:
    """Every prompt there is (92,160), in a fixed order."""
    return (", ".join(words) for words in itertools.product(*SLOTS))


def held_out_prompts(count: int = HELD_OUT) -> list[str]:
    """The first `count` (at most HELD_OUT) of the prompts that no training run ever sees; the same on every machine."""
    if not 0 <= count <= HELD_OUT:
        raise ValueError(f"count={count}: there are {HELD_OUT} held-out prompts")
    # random() is specified to be stable over Python versions; sample() and shuffle() are not.
    draw = random.Random(_SPLIT_SEED).random
    chosen: dict[str, None] = {}
    while len(chosen) < HELD_OUT:
        chosen[", ".join(list(slot)[int(draw() * len(slot))] for slot in SLOTS)] = None
    return list(chosen)[:count]
