"""The training rows of the embedded tiny model: conversations of task examples as token ids."""

import itertools
import multiprocessing
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer

from jobs.tasks import SYSTEM, TASKS, Example, examples
from jobs.tiny_tokenizer import END, OTHER_SYSTEM, START, STOP

WIDTHS = (256, 1024)
LONG_EVERY = 4
CHUNK_ROWS = 1000
WEIGHTS = {"add": 3.0, "subtract": 3.0, "count": 1.5}


class RowMaker:
    """Turns training examples into rows of token ids; answer tokens are stored as their complement."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._ask = self._ids(f"{START}user\n"), self._ids(f"{STOP}\n{START}assistant\n")
        self._close = self._ids("\n")
        self._stop = tokenizer.token_to_id(STOP)
        self._pad = tokenizer.token_to_id(END)
        self._systems = [
            self._ids(f"{START}system\n{text}{STOP}\n") if text else [] for text in (SYSTEM, OTHER_SYSTEM, None)
        ]

    def __call__(self, job: tuple[int, int]) -> np.ndarray:
        """The rows of one chunk, a function of seed, width and chunk number alone."""
        width, chunk = job
        rng = random.Random(f"rows:{self._seed}:{width}:{chunk}")
        turns = self._turns(f"{self._seed}:{width}:{chunk}", rng)
        rows = np.full((CHUNK_ROWS, width), self._pad, dtype=np.int16)
        for row in rows:
            ids = self._conversation(rng, turns, width)
            row[: len(ids)] = ids
        return rows

    def _conversation(self, rng: random.Random, turns: Iterator[list[int]], width: int) -> list[int]:
        """One turn in two rows of five, otherwise as many turns as fit."""
        ids = list(rng.choices(self._systems, weights=(75, 10, 15))[0])
        single = width == WIDTHS[0] and rng.random() < 0.4
        for number in itertools.count():
            turn = next(turns)
            if len(ids) + len(turn) > width or (single and number):
                return ids
            ids += turn
        raise AssertionError("itertools.count does not end")

    def _turns(self, seed: str, rng: random.Random, batch: int = 2000) -> Iterator[list[int]]:
        sources = {task: examples(task, f"rows:{seed}", held_out=False) for task in TASKS}
        weights = [WEIGHTS.get(task, 1.0) for task in TASKS]
        while True:
            tasks = rng.choices(list(TASKS), weights=weights, k=batch)
            yield from self.encode([next(sources[task]) for task in tasks])

    def encode(self, batch: list[Example]) -> Iterator[list[int]]:
        """The token ids of each question and answer as one turn of a conversation."""
        prompts = self._tokenizer.encode_batch_fast([example.prompt for example in batch])
        answers = self._tokenizer.encode_batch_fast([example.answer for example in batch])
        for prompt, answer in zip(prompts, answers, strict=True):
            targets = [~token for token in [*answer.ids, self._stop]]
            yield [*self._ask[0], *prompt.ids, *self._ask[1], *targets, *self._close]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids


def make_pools(tokenizer: Tokenizer, seed: int, num_rows: int) -> dict[int, torch.Tensor]:
    """The training rows by width, `num_rows` short ones; the wide rows hold a quarter of the tokens."""
    maker = RowMaker(tokenizer, seed)
    pools = {}
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as workers:
        for width in WIDTHS:
            rows = num_rows if width == WIDTHS[0] else num_rows * WIDTHS[0] // width // (LONG_EVERY - 1)
            jobs = [(width, chunk) for chunk in range(max(1, rows // CHUNK_ROWS))]
            pools[width] = torch.from_numpy(np.concatenate(workers.map(maker, jobs, chunksize=4)))
    return pools
