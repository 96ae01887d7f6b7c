"""The sizes of a run's steps, by its records."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.step_sizes import StepSizes


def recorded_sizes(run: RecordedRun) -> StepSizes:
    """Of all steps of a run."""
    num_rows = run.column("batch_size").astype(np.int64)
    num_decodes = run.column("num_decode_tokens").astype(np.int64)
    step = np.repeat(np.arange(len(num_rows)), num_rows)
    place = np.arange(len(step)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    is_decode = place < num_decodes[step]
    counts = run.lists("seq_num_tokens").astype(np.int64)
    contexts = run.lists("seq_context_lens").astype(np.int64)
    pairs = counts * (contexts - counts) + counts * (counts + 1) // 2

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(step, values, len(num_rows)).astype(np.int64)

    return StepSizes(
        num_rows=num_rows,
        num_decodes=num_decodes,
        num_tokens=num_decodes + run.column("num_prefill_tokens"),
        num_sampled=total(run.lists("seq_sampled")),
        decode_context=total(contexts * is_decode),
        prefill_pairs=total(pairs * ~is_decode),
    )


def recorded_halves(run: RecordedRun, by_rule: np.ndarray) -> np.ndarray:
    """bool [steps]: which ran in halves; `by_rule` where an older version did not write it."""
    return pc.call_function("coalesce", [run.steps["in_halves"], pa.array(by_rule)]).to_numpy()
