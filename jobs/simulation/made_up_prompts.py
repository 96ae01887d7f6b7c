"""Prompts that have exactly as many leading tokens in common as the recorded ones, which nobody kept."""

import numpy as np

FIRST_OWN_TOKEN = 2**30
"""Tokens that were made up are this and more, so that they are none of a recorded output's."""
FILLING = FIRST_OWN_TOKEN - 1

_Marks = tuple[tuple[int, int], ...]
"""Places in a prompt, in order, and the tokens there."""


class MadeUpPrompts:
    """All arrays [rows]. A prompt is FILLING but for a few places: its own one, which is the first where it is unlike
    every earlier prompt, and in front of that those of the prompts that it begins like.

    Ask in order, from the first row on.
    """

    def __init__(
        self, row: np.ndarray, num_tokens: np.ndarray, shared_row: np.ndarray, shared_tokens: np.ndarray
    ) -> None:
        """The first `shared_tokens` of a prompt are those of `shared_row`'s; equal rows (samples) have one prompt."""
        self._row, self._num_tokens = row.tolist(), num_tokens.tolist()
        self._shared_row, self._shared_tokens = shared_row.tolist(), shared_tokens.tolist()
        again = row[1:][row[1:] == row[:-1]]
        self._is_needed = {*shared_row[shared_tokens > 0].tolist(), *again.tolist()}  # by later rows
        self._marks: dict[int, _Marks] = {}

    def one(self, index: int) -> np.ndarray:
        """int32 [tokens of the prompt], not to be written to."""
        prompt = np.full(self._num_tokens[index], FILLING, np.int32)
        for place, token in self._marks_of(index):
            prompt[place] = token
        prompt.flags.writeable = False
        return prompt

    def all(self) -> np.ndarray:
        """int32 [tokens of all prompts], one after the other."""
        prompts = np.full(sum(self._num_tokens), FILLING, np.int32)
        places: list[int] = []
        tokens: list[int] = []
        start = 0
        for index, length in enumerate(self._num_tokens):
            for place, token in self._marks_of(index):
                places.append(start + place)
                tokens.append(token)
            start += length
        prompts[places] = tokens
        return prompts

    def _marks_of(self, index: int) -> _Marks:
        row, num_shared = self._row[index], min(self._shared_tokens[index], self._num_tokens[index])
        if row in self._marks:
            return self._marks[row]
        marks: _Marks = ()
        if num_shared:
            shared_row = self._shared_row[index]
            of_shared = self._marks.get(shared_row, ((0, _own_token(shared_row)),))  # a row that never ended
            marks = tuple(mark for mark in of_shared if mark[0] < num_shared)
        if num_shared < self._num_tokens[index]:
            marks = (*marks, (num_shared, _own_token(row)))
        if row in self._is_needed:
            self._marks[row] = marks
        return marks


def _own_token(row: int) -> int:
    return FIRST_OWN_TOKEN + row % (2**30 - 1)
