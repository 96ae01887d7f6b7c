"""The tasks that the embedded tiny model is trained on, as programs that write and check examples.

Every task turns a random generator into one question and its only right answer. A stable hash of the
question decides which side of the split it belongs to, so the two sides never share a question.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SYSTEM = (
    "You are a small and careful worker. Read the task of the user, do exactly what it asks, and reply with "
    "the result alone: no greeting, no explanation, no extra words. Keep the spelling and the order of "
    "everything that you copy."
)

HELD_OUT_ONE_IN = 64


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    "acorn actor anchor apple arrow badge banana basket beach bell bird boat book bottle bridge cabin camel "
    "candle carpet castle cherry clock cloud coin desk dish dollar door dragon drum duck eagle earth egg "
    "engine envelope face farmer feather field flag flower fox garden gate ghost glass goat grape guitar hammer "
    "harbor hat hill honey horse house ice inch ink insect iron island jacket jar jelly jewel judge jungle key "
    "king kitchen kite knife ladder lake lamp leaf lemon lion magnet map market mirror moon mouse nail napkin "
    "needle nest noodle nurse oak ocean office olive onion orange paint paper pencil piano pillow pilot queen "
    "question quilt rabbit radio rain ring river rope sailor salt school ship snow spoon table tiger tooth "
    "tower train tree umbrella uncle unicorn valley vase violin voice wagon wall water whale window wolf yacht "
    "yard yarn zebra zero zipper"
)
ADJECTIVES = _words(
    "brave bright busy calm clever cold dark dusty eager early empty fast gentle giant green happy heavy hungry "
    "large lazy little lonely loud lucky old pale patient polite proud quick quiet red round rusty sharp shiny "
    "silent silver slow small soft strange tall tiny warm white wise wooden yellow young"
)
VERBS = _words(
    "admires answers breaks brings builds calls carries catches chases cleans counts draws drops feeds finds "
    "follows forgets guards helps hides holds keeps lifts likes loses makes meets misses moves opens orders "
    "pulls pushes reads repairs sees sells sends shows steals takes visits wants washes watches"
)
NAMES = _words(
    "Ada Alan Anna Boris Carla Cleo Daniel Diana Edgar Elena Felix Fiona Grace Hugo Ida Ivan Jonas Julia Karl "
    "Laura Leo Maria Martin Nadia Nina Oscar Paula Peter Quentin Rosa Ruth Simon Sofia Tara Thomas Ursula "
    "Victor Wanda Xavier Yara Zoe"
)
CITIES = _words(
    "Athens Berlin Boston Cairo Delhi Dublin Geneva Havana Kyoto Lagos Lima Lisbon London Madrid Milan Nairobi "
    "Oslo Oxford Paris Prague Quito Riga Rome Seoul Sydney Tokyo Toronto Tunis Vienna Warsaw Zurich"
)
COLORS = _words("amber beige black blue brown coral gold gray green ivory olive orange pink purple red white")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its only right answer; `prompt` is the whole message of the user."""

    task: str
    prompt: str
    answer: str


def add(rng: random.Random) -> Example:
    """A sum of two numbers of up to three digits."""
    first, second = _number(rng), _number(rng)
    return Example("add", f"What is {first} + {second}?", str(first + second))


def subtract(rng: random.Random) -> Example:
    """A difference of two numbers of up to three digits that is never negative."""
    second, first = sorted((_number(rng), _number(rng)))
    return Example("subtract", f"What is {first} - {second}?", str(first - second))


def sort_words(rng: random.Random) -> Example:
    """Words with different first letters, put in alphabetical order."""
    words = _distinct_initials(rng, rng.randint(4, 8))
    return Example("sort_words", f"Sort these words from A to Z: {', '.join(words)}", ", ".join(sorted(words)))


def reverse_words(rng: random.Random) -> Example:
    """A list of words read from its end."""
    words = rng.sample(NOUNS, rng.randint(4, 12))
    return Example("reverse_words", f"Write these words in reverse order: {' '.join(words)}", " ".join(reversed(words)))


def count(rng: random.Random) -> Example:
    """Counting upwards from a number to another by a fixed step."""
    start, step = rng.randint(0, 99), rng.randint(1, 9)
    numbers = [start + step * index for index in range(rng.randint(8, 30))]
    prompt = f"Count from {start} to {numbers[-1]} in steps of {step}."
    return Example("count", prompt, " ".join(map(str, numbers)))


def repeat(rng: random.Random) -> Example:
    """A few words written on several numbered lines."""
    words = " ".join(rng.sample(NOUNS, rng.randint(2, 5)))
    times = rng.randint(3, 9)
    lines = [f"{number}: {words}" for number in range(1, times + 1)]
    return Example("repeat", f"Write this on {times} numbered lines: {words}", "\n".join(lines))


def spell(rng: random.Random) -> Example:
    """Words spelled letter by letter."""
    words = rng.sample(NOUNS, rng.randint(2, 6))
    return Example("spell", f"Spell with dashes: {' '.join(words)}", " ".join(map("-".join, words)))


def replace_word(rng: random.Random) -> Example:
    """A sentence copied with one noun replaced wherever it stands."""
    *nouns, new = rng.sample(NOUNS, 5)
    old = rng.choice(nouns)
    if rng.random() < 0.3:
        nouns[rng.randrange(4)] = old
    sentence = f"{_clause(rng, *nouns[:2])} and {_clause(rng, *nouns[2:])}"
    answer = " ".join(new if word == old else word for word in sentence.split())
    return Example("replace_word", f"Replace {old} with {new} in this sentence: {sentence}", answer)


def json_field(rng: random.Random) -> Example:
    """The value of one field of a flat JSON object."""
    fields = list(_record(rng).items())
    rng.shuffle(fields)
    fields = fields[: rng.randint(4, len(fields))]
    name, value = rng.choice(fields)
    return Example("json_field", f'What is the value of "{name}" in {json.dumps(dict(fields))}', str(value))


def fill_form(rng: random.Random) -> Example:
    """A form of several lines filled in from a list of facts in any order."""
    facts = {
        "name": rng.choice(NAMES),
        "item": f"{rng.choice(COLORS)} {rng.choice(NOUNS)}",
        "count": str(rng.randint(2, 99)),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    order = rng.sample(sorted(facts), len(facts))
    prompt = "Write the order form for " + ", ".join(f"{key} = {facts[key]}" for key in order)
    lines = (
        f"ORDER FOR {facts['name']}",
        f"Item: {facts['item']}",
        f"Number of pieces: {facts['count']}",
        f"Send to: {facts['city']}",
        f"Arrives on: {facts['day']}",
        f"Thank you, {facts['name']}! Your {facts['item']} will be in {facts['city']} on {facts['day']}.",
    )
    return Example("fill_form", prompt, "\n".join(lines))


TASKS: dict[str, Callable[[random.Random], Example]] = {
    maker.__name__: maker
    for maker in (
        add,
        subtract,
        sort_words,
        reverse_words,
        count,
        repeat,
        spell,
        replace_word,
        json_field,
        fill_form,
    )
}


def is_held_out(prompt: str) -> bool:
    """Whether a question is kept for evaluation; a function of its text alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def examples(task: str, seed: int | str, *, held_out: bool) -> Iterator[Example]:
    """An endless stream of examples of one task and one side of the split, the same for the same seed."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    rng = random.Random(f"{task}:{seed}")
    while True:
        example = TASKS[task](rng)
        if is_held_out(example.prompt) == held_out:
            yield example


def held_out_examples(task: str, number: int, seed: int | str) -> list[Example]:
    """The first `number` different held-out examples of a task under a seed."""
    found: dict[str, Example] = {}
    for example in examples(task, seed, held_out=True):
        found.setdefault(example.prompt, example)
        if len(found) >= number:
            break
    return list(found.values())


def chat(example: Example, system: str | None = SYSTEM) -> list[dict[str, str]]:
    """The messages that ask an example's question."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": example.prompt}]


def bundled_prompts(number: int = 200, seed: int | str = "bundled") -> list[dict[str, object]]:
    """The held-out rows that ship as the default input, with all tasks mixed."""
    share = -(-number // len(TASKS))
    rows = [
        {"id": f"{task}-{index}", "task": task, "messages": chat(example), "answer": example.answer}
        for task in TASKS
        for index, example in enumerate(held_out_examples(task, share, seed))
    ]
    random.Random(f"order:{seed}").shuffle(rows)
    return rows[:number]


def is_correct(text: str, answer: str) -> bool:
    """Whether a generated text is the answer, up to white space around it."""
    return text.strip() == answer.strip()


def _number(rng: random.Random) -> int:
    """A number below 1000; two digits come up in a fifth of the draws, one digit in some."""
    return rng.randint(0, 99) if rng.random() < 0.2 else rng.randint(0, 999)


def _distinct_initials(rng: random.Random, number: int) -> list[str]:
    """Nouns of which no two start with the same letter, in random order."""
    words: dict[str, str] = {}
    while len(words) < number:
        word = rng.choice(NOUNS)
        words.setdefault(word[0], word)
    return list(words.values())


def _clause(rng: random.Random, subject: str, target: str) -> str:
    """A clause about two nouns."""
    first, second = rng.sample(ADJECTIVES, 2)
    return f"the {first} {subject} {rng.choice(VERBS)} the {second} {target}"


def _record(rng: random.Random) -> dict[str, str | int]:
    """A flat record with all the fields that `json_field` may ask for."""
    return {
        "name": rng.choice(NAMES),
        "friend": rng.choice(NAMES),
        "city": rng.choice(CITIES),
        "color": rng.choice(COLORS),
        "item": rng.choice(NOUNS),
        "age": rng.randint(1, 99),
        "price": rng.randint(1, 999),
        "day": rng.choice(DAYS),
    }
