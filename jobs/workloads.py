"""The benchmark's workloads as token ids: a seed says it all, so every engine is given the same ones."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

TOP_ID = 10_000
"""Ids are drawn from 0 to this one, as nano-vllm's own benchmark does, whose lengths `nano` has too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts, and how many tokens each is continued by."""

    prompts: list[list[int]]
    output_lens: list[int]
    num_shared: int = 0
    """Tokens that all prompts begin with."""

    def mirrored(self, top_id: int) -> "Workload":
        """Equal work that no prefix cache answers from this one: other ids, `top_id` minus each."""
        return replace(self, prompts=[[top_id - i for i in prompt] for prompt in self.prompts])

    @property
    def prompt_lens(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What may be smaller than in the workload as it is published."""

    scale: float = 1.0
    """Factor on every length and on the number of sequences; each stays at least 1."""
    vocab_size: int = TOP_ID + 1
    """Of the model: a small one cannot take every id."""

    @property
    def top_id(self) -> int:
        return min(TOP_ID, self.vocab_size - 1)

    def of(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def ids(self, rng: random.Random, length: int) -> list[int]:
        return [rng.randint(0, self.top_id) for _ in range(length)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadKind:
    """A named workload: how it is drawn, and the engine's limits that suit it."""

    about: str
    draw: Callable[[random.Random, Sizes], Workload]
    longest: tuple[int, ...]
    """The lengths that make up its longest sequence, output included."""
    max_num_seqs: int
    max_num_batched_tokens: int = 8192
    counts_input: bool = False
    """Whether its prompts are the work, so that its speed is told in all tokens too."""

    def build(self, seed: int, sizes: Sizes) -> Workload:
        return self.draw(random.Random(seed), sizes)

    def longest_len(self, sizes: Sizes) -> int:
        """Prompt and output together, of the longest sequence that can be drawn."""
        return sum(sizes.of(length) for length in self.longest)


def check_workloads(key: str, names: Sequence[str]) -> None:
    """Raises ValueError that lists the workloads there are."""
    if not names or any(name not in WORKLOADS for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"{key}={','.join(names)}: must be one or more of {', '.join(WORKLOADS)}, each once, with commas between"
        )


def _nano(rng: random.Random, sizes: Sizes) -> Workload:
    shortest, longest, count = sizes.of(100), sizes.of(1024), sizes.of(256)
    prompts = [sizes.ids(rng, rng.randint(shortest, longest)) for _ in range(count)]
    return Workload(prompts=prompts, output_lens=[rng.randint(shortest, longest) for _ in range(count)])


def _equal(count: int, prompt_len: int, output_len: int) -> Callable[[random.Random, Sizes], Workload]:
    def draw(rng: random.Random, sizes: Sizes) -> Workload:
        prompts = [sizes.ids(rng, sizes.of(prompt_len)) for _ in range(sizes.of(count))]
        return Workload(prompts=prompts, output_lens=[sizes.of(output_len)] * len(prompts))

    return draw


def _shared(rng: random.Random, sizes: Sizes) -> Workload:
    prefix = sizes.ids(rng, sizes.of(2048))
    prompts = [prefix + sizes.ids(rng, sizes.of(64)) for _ in range(sizes.of(1024))]
    return Workload(prompts=prompts, output_lens=[sizes.of(128)] * len(prompts), num_shared=len(prefix))


WORKLOADS = {
    "nano": WorkloadKind(
        about="256 sequences, 100 to 1,024 tokens in and out: bound by reading the KV cache",
        draw=_nano,
        longest=(1024, 1024),
        max_num_seqs=256,
    ),
    "many": WorkloadKind(
        about="1,024 sequences, 128 in, 256 out: large decode batches over short contexts",
        draw=_equal(1024, 128, 256),
        longest=(128, 256),
        max_num_seqs=1024,
    ),
    "short": WorkloadKind(
        about="4,096 sequences, 512 in, 8 out, as in classification: bound by prefill and by the host",
        draw=_equal(4096, 512, 8),
        longest=(512, 8),
        max_num_seqs=1024,
        max_num_batched_tokens=16384,
        counts_input=True,
    ),
    "shared": WorkloadKind(
        about="1,024 sequences, 2,048 tokens in common and 64 of their own in, 128 out: prefix caching",
        draw=_shared,
        longest=(2048, 64, 128),
        max_num_seqs=1024,
    ),
    "long": WorkloadKind(
        about="16 sequences, 8,192 in, 512 out: few and long contexts",
        draw=_equal(16, 8192, 512),
        longest=(8192, 512),
        max_num_seqs=16,
    ),
}
