"""The tokenizer of the embedded tiny model: a byte-level BPE with the tokens of ChatML."""

import itertools
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jobs.tasks import SYSTEM, TASKS, examples

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 2048
OTHER_SYSTEM = "You are a helpful assistant."

PRE_TOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE in which every digit is a token, fitted to training questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, START, STOP],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    return tokenizer


def _corpus(seed: int) -> Iterator[str]:
    for task in TASKS:
        for example in itertools.islice(examples(task, f"tokenizer:{seed}", held_out=False), 3000):
            yield f"system\n{SYSTEM}"
            yield f"user\n{example.prompt}"
            yield f"assistant\n{example.answer}"
    yield from itertools.repeat(f"system\n{OTHER_SYSTEM}", 1000)
