"""What a step's cost depends on: sizes, as counted in a plan."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jobs.simulation.run_facts import RunFacts
from jobs.simulation.settings import Settings
from nanovllm.engine.plan import Plan
from nanovllm.runner.graph_sizes import NEVER, GraphSizes


class StepSizes(NamedTuple):
    """Of one step as ints, or of many as arrays [steps]."""

    num_rows: Any
    num_decodes: Any
    num_tokens: Any
    num_sampled: Any
    decode_context: Any
    """Tokens whose KV the decode rows read, their own included."""
    prefill_pairs: Any
    """(query, key) pairs of the prefill rows' causal attention."""

    @property
    def num_prefill_tokens(self) -> Any:
        return self.num_tokens - self.num_decodes


def sizes_of_plan(plan: Plan) -> StepSizes:
    starts, decodes, rows = plan.starts, plan.num_decodes, len(plan.starts)
    if decodes == rows:
        return StepSizes(rows, rows, rows, rows, int(starts.sum()) + rows, 0)
    counts = plan.num_tokens[decodes:].astype(np.int64)
    pairs = int((counts * starts[decodes:] + counts * (counts + 1) // 2).sum())
    context = int(starts[:decodes].sum()) + decodes
    sampled = int(np.count_nonzero(plan.samples))
    return StepSizes(rows, decodes, decodes + len(plan.prefill_token_ids), sampled, context, pairs)


@dataclass(frozen=True, slots=True)
class Padding:
    """What a runner makes of a step's tokens and rows of logits: the next CUDA graph's, or the next multiple."""

    graphs: GraphSizes | None
    multiple: int
    of_decodes: np.ndarray
    """[tokens of a step without prefills]"""
    of_tokens: np.ndarray
    """[tokens of a step with prefills]"""
    of_sampled: np.ndarray
    """[rows of logits of a step with prefills]"""
    halves_from: np.ndarray
    """[rows of a step without prefills]: the tokens of context from which it runs in halves"""
    captures_late: bool = False
    """Whether graphs of steps with prefills are captured when they first come, all but the largest one."""

    @classmethod
    def of(cls, facts: RunFacts, settings: Settings) -> "Padding":
        graphs, multiple = facts.graph_sizes(settings), int(facts.engine.get("row_multiple", 1))
        seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
        none: list[int] = []
        return cls(
            graphs=graphs,
            multiple=multiple,
            of_decodes=_table(graphs.decodes if graphs else none, seqs, multiple),
            of_tokens=_table(graphs.tokens if graphs else none, tokens, multiple),
            of_sampled=_table(graphs.sampled if graphs and graphs.tokens else none, seqs, multiple),
            halves_from=np.array([graphs.halves_from(rows) if graphs else NEVER for rows in range(seqs + 1)]),
            captures_late=facts.captures_late,
        )

    def in_halves(self, sizes: StepSizes, saved: Any) -> Any:
        """Whether steps run in halves; `saved` are the tokens that shared prefixes save each of them."""
        decodes = sizes.num_decodes == sizes.num_rows
        if isinstance(decodes, bool):
            return decodes and not saved and sizes.decode_context >= self.halves_from.item(sizes.num_rows)
        rows = np.where(decodes, sizes.num_rows, 0)
        return decodes & (np.asarray(saved) == 0) & (sizes.decode_context >= self.halves_from[rows])

    def padded(self, sizes: StepSizes) -> tuple[Any, Any]:
        """(tokens, rows of logits) that are really computed; of one step or of many."""
        if isinstance(sizes.num_tokens, int):
            if sizes.num_decodes == sizes.num_rows:
                tokens = self.of_decodes.item(sizes.num_tokens)
                return tokens, tokens
            return self.of_tokens.item(sizes.num_tokens), self.of_sampled.item(sizes.num_sampled)
        decodes = sizes.num_decodes == sizes.num_rows
        tokens = self.of_tokens[sizes.num_tokens]
        tokens[decodes] = self.of_decodes[sizes.num_tokens[decodes]]
        return tokens, np.where(decodes, tokens, self.of_sampled[sizes.num_sampled])

    def has_graph(self, *, prefills: bool) -> bool:
        return self.graphs is not None and (not prefills or bool(self.graphs.tokens))

    def is_captured_late(self, tokens: int, sampled: int) -> bool:
        """Whether a step with prefills has a shape whose graph is captured when it first comes."""
        graphs = self.graphs
        if not self.captures_late or graphs is None or not graphs.tokens:
            return False
        return (tokens, sampled) != (graphs.tokens[-1], graphs.sampled[-1])


def _table(sizes: list[int], most: int, multiple: int) -> np.ndarray:
    """int64 [0..most]: what each count is padded to."""
    counts = np.arange(most + 1)
    if not sizes:
        return -(-counts // multiple) * multiple
    return np.array(sizes, np.int64)[np.minimum(np.searchsorted(sizes, counts), len(sizes) - 1)]
