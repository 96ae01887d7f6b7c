"""A Runner that computes nothing: it knows what each step would cost, and how the recorded rows went on."""

from collections import deque
from dataclasses import replace

import numpy as np

from jobs.simulation.cost_model import CostModel
from jobs.simulation.forward_cost import SharedReads
from jobs.simulation.recorded_rows import RecordedRows
from jobs.simulation.shared_reads import SharedReadsFinder
from jobs.simulation.step_sizes import Padding, StepSizes, sizes_of_plan
from nanovllm.engine.plan import Plan, StepResult

_NONE = SharedReads()


class CostModelRunner:
    """Has the engine's clock: the host's time, which goes on when the host works or waits.

    With a look-ahead of 1 the device is at one step while the host prepares the next, as on a GPU; with 0 a step has
    run when the host goes on, as on a CPU. Times are milliseconds in floating point, the clock's whole nanoseconds.
    """

    def __init__(
        self,
        model: CostModel,
        rows: RecordedRows,
        padding: Padding,
        *,
        lookahead: int,
        max_num_seqs: int,
        finder: SharedReadsFinder | None,
    ) -> None:
        """`finder` for a runner whose attention reads shared prefixes once."""
        self.lookahead = lookahead
        self.shared: list[SharedReads] = []
        """Of each step, where a finder is."""
        self.most_rows = 0
        self.most_tokens = 0
        """Of a step, padded."""
        self._model = model
        self._padding = padding
        self._finder = finder
        self.now_ms = 0.0
        self._device_free = 0.0
        self._results: deque[tuple[StepResult, float]] = deque()
        self._last_decoded = np.empty(0, np.int64)
        """Sequences that the latest step decoded."""
        self._captured: set[tuple[int, int]] = set()
        self._output_tokens = rows.output_tokens
        self._output_ends = np.append(rows.output_starts[1:], len(rows.output_tokens)) - 1
        self._output_starts = rows.output_starts
        self._rows = rows
        # By seq_id: where the token at position 0 would stand, and the last place of the sequence's output.
        self._bases = rows.output_starts - rows.num_prompt_tokens
        self._lasts = self._output_ends.copy()
        alone = np.arange(max_num_seqs + 1)
        zeros = np.zeros_like(alone)
        decodes = StepSizes(alone, alone, alone, alone, zeros, zeros)
        self._decode_forward_ms = model.forward_ms(decodes, padding, SharedReads()).tolist()
        self._decode_submit_ms = model.submit_ms(decodes).tolist()
        self._decode_gap_ms = model.gap_ms(decodes)[0].item()
        one = np.array([0, 1])
        per_token = StepSizes(one * 0, one * 0, one * 0, one * 0, one, one * 0)
        self._context_ms = float(np.diff(model.forward_ms(per_token, padding, SharedReads()))[0])
        self._halves_from = padding.halves_from.tolist()
        self._whole_ms = model.whole_ms

    # The clock

    def clock(self) -> int:
        """Nanoseconds."""
        return round(self.now_ms * 1e6)

    def spend(self, ms: float) -> None:
        """The host is at work."""
        self.now_ms += ms

    def wait_until(self, ns: float) -> None:
        self.now_ms = max(self.now_ms, ns / 1e6)

    # The sequences

    def expect(self, seq_id: int, index: int) -> None:
        """The engine's new sequence is the recorded row at `index`, and not the one at `seq_id`."""
        self._bases[seq_id] = self._output_starts[index] - self._rows.num_prompt_tokens[index]
        self._lasts[seq_id] = self._output_ends[index]

    # What a Runner does

    def submit(self, plan: Plan) -> None:
        sizes = sizes_of_plan(plan)
        shared = _NONE if self._finder is None else self._find_shared(self._finder, plan)
        self._last_decoded = plan.seq_ids[: plan.num_decodes]
        rows = sizes.num_rows
        tokens, sampled = self._padding.padded(sizes)
        if rows > self.most_rows:
            self.most_rows = rows
        if tokens > self.most_tokens:
            self.most_tokens = tokens
        if sizes.num_decodes == rows:
            submit_ms, forward_ms, gap_ms = self._decode_costs(rows, sizes.decode_context, shared)
        else:
            submit_ms, forward_ms, gap_ms = self._model.of_step(sizes, self._padding, shared)
        prefills = sizes.num_decodes < rows
        submit_ms += self._capture_ms(tokens, sampled) if prefills else 0.0
        self.now_ms += submit_ms
        self._device_free = max(self._device_free, self.now_ms) + forward_ms + gap_ms
        if not self.lookahead:
            self.now_ms = self._device_free
        has_graph = self._padding.has_graph(prefills=prefills)
        result = StepResult(
            token_ids=self._tokens(plan),
            prepare_ms=submit_ms,
            forward_ms=forward_ms,
            padded_batch_size=rows if prefills else tokens,
            padded_tokens=tokens,
            cuda_graph=has_graph,
            in_halves=not prefills and self._in_halves(rows, sizes.decode_context, shared),
            logits_rows=sampled,
        )
        self._results.append((result, self._device_free))

    def longest_leap(self, seq_ids: np.ndarray, num_known: np.ndarray) -> int:
        """Steps that may be taken at once: each of these sequences, which have `num_known` tokens, surely goes on.

        0 where others decoded last: what these share in the cache has to be looked for.
        """
        if not np.array_equal(seq_ids, self._last_decoded):
            return 0
        return int((self._lasts[seq_ids] - self._bases[seq_ids] - num_known).min()) - 1

    def next_tokens(self, seq_ids: np.ndarray, num_known: np.ndarray, count: int) -> np.ndarray:
        """int32 [sequences, count]: those that follow on the `num_known` ones of each sequence."""
        return self._output_tokens[(self._bases[seq_ids] + num_known)[:, None] + np.arange(count)]

    def leap(self, num_steps: int, rows: int, context: int, after_ms: float, under_way: list[Plan]) -> None:
        """Steps that decode the `rows` of the last one again, with `context` tokens in the first of them.

        The host works `after_ms` after each. `under_way` are the plans submitted and not collected at the end.
        """
        shared = self.shared[-1] if self.shared else _NONE
        if self._finder is not None:
            self.shared += [shared] * num_steps
        results = deque(done for _, done in self._results)
        for step in range(num_steps):
            submit_ms, forward_ms, gap_ms = self._decode_costs(rows, context + step * rows, shared)
            self.now_ms += submit_ms
            self._device_free = max(self._device_free, self.now_ms) + forward_ms + gap_ms
            results.append(self._device_free)
            self.now_ms = max(self.now_ms, results.popleft()) + after_ms
        old = (result for result, _ in self._results)
        self._results = deque(
            (replace(result, token_ids=self._tokens(plan)), done)
            for result, plan, done in zip(old, under_way, results, strict=True)
        )

    def collect(self) -> StepResult:
        result, done = self._results.popleft()
        self.now_ms = max(self.now_ms, done)
        return result

    def _tokens(self, plan: Plan) -> np.ndarray:
        seq_ids, places = plan.seq_ids, plan.starts + plan.num_tokens
        if plan.num_decodes < len(seq_ids):
            seq_ids, places = seq_ids[plan.samples], places[plan.samples]
        return self._output_tokens[np.minimum(self._bases[seq_ids] + places, self._lasts[seq_ids])]

    def _capture_ms(self, tokens: int, sampled: int) -> float:
        """Of a graph that is not there yet; it begins when the device is done."""
        shape = tokens, sampled
        if shape in self._captured or not self._padding.is_captured_late(*shape):
            return 0.0
        self._captured.add(shape)
        return max(self._device_free - self.now_ms, 0.0) + self._model.capture_ms

    def _find_shared(self, finder: SharedReadsFinder, plan: Plan) -> SharedReads:
        shared = finder.find(plan)
        self.shared.append(shared)
        return shared

    def _decode_costs(self, rows: int, context: int, shared: SharedReads) -> tuple[float, float, float]:
        """As CostModel.of_step, of a step without prefills."""
        if shared.saved:
            return self._model.of_step(StepSizes(rows, rows, rows, rows, context, 0), self._padding, shared)
        forward_ms = self._decode_forward_ms[rows] + self._context_ms * context
        if self._in_halves(rows, context, shared):
            forward_ms -= self._whole_ms
        return self._decode_submit_ms[rows], forward_ms, self._decode_gap_ms

    def _in_halves(self, rows: int, context: int, shared: SharedReads) -> bool:
        """Of a step without prefills."""
        return context >= self._halves_from[rows] and not shared.saved
