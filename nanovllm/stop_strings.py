"""Notices the stop strings of one sequence while its tokens come in."""

from nanovllm.text import Tokenizer, Utf8Decoder


class StopChecker:
    """Whether a sequence's text holds a stop string, asked after each of its tokens.

    Answers as a search of `tokenizer.decode` of all tokens so far would, at the cost of the last few: it fires
    with the token that completes a stop string, never later and never without one. Tokens that are no text
    (special ones) do not part a string. A stop string that is a special token fires only when it is spelt out;
    `Tokenizer.special_token_ids` gives the id to stop at.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._matcher = (_ByteMatcher if tokenizer.byte_level else _WindowMatcher)(tokenizer, stop)
        self.matched = False
        """Whether a stop string has been seen."""

    def push(self, token_id: int) -> bool:
        """Add the next token; true once a stop string is in the text."""
        self.matched = self.matched or self._matcher.push(token_id)
        return self.matched


class _ByteMatcher:
    """For tokens that stand for bytes: decodes each once and keeps as much text as a match can begin in."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._stop = stop
        self._keep = max(map(len, stop), default=1) - 1
        self._decoder = Utf8Decoder()
        self._tail = ""

    def push(self, token_id: int) -> bool:
        text = self._tail + self._decoder.push(self._token_bytes(token_id) or b"")
        self._tail = text[-self._keep :] if self._keep else ""
        return any(string in text for string in self._stop)


class _WindowMatcher:
    """For tokens whose text depends on their neighbours: decodes a window at the end, all when that one hits.

    A window's first characters can differ from the same place in the whole text (a leading space is dropped),
    so the window always reaches MARGIN characters further back than a match can begin.

        tokens   ... start ........ mark ........ end
        text          >= longest + MARGIN, then what came since the mark
    """

    MARGIN = 16

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._keep = max(map(len, stop), default=1) + self.MARGIN
        self._ids: list[int] = []
        self._start = 0
        self._mark = 0
        self._chars_at_mark = 0

    def push(self, token_id: int) -> bool:
        piece = self._tokenizer.token_bytes(token_id)
        if piece is None:
            return False
        self._ids.append(token_id)
        window = self._tokenizer.decode(self._ids[self._start :])
        # Bytes of one character are decoded together, so a window never begins within them.
        if not piece and len(window) - self._chars_at_mark >= self._keep:
            self._start, self._mark = self._mark, len(self._ids)
            self._chars_at_mark = len(self._tokenizer.decode(self._ids[self._start :]))
        return self._occurs_in(window) and self._occurs_in(self._tokenizer.decode(self._ids))

    def _occurs_in(self, text: str) -> bool:
        return any(string in text for string in self._stop)
