"""Where the wall time of a run went: every nanosecond in exactly one place."""

from dataclasses import dataclass

import numpy as np

from jobs.analysis.segments import Segment

LOAD, CAPTURE, PREFILL, DECODE, TAIL = "load", "capture", "prefill", "decode", "tail"
RECOMPUTE, PADDING, HOST, UNRECORDED = "recompute", "padding", "host gaps", "unrecorded"
WRITE, OTHER = "writing", "other"
PLACES = {
    LOAD: "reading the model and its weights",
    CAPTURE: "warming up and capturing CUDA graphs",
    PREFILL: "device time of prompt tokens",
    DECODE: "device time of output tokens",
    TAIL: "device time of the last rows, at most 1/8 of the largest batch",
    RECOMPUTE: "device time of what preempted rows computed again",
    PADDING: "device time of tokens that pad a step to its CUDA graph",
    HOST: "while generating, the device had nothing to do",
    UNRECORDED: "generating with recorder=off, of which there are no steps",
    WRITE: "writing results and closing the records",
    OTHER: "starting; what lies between; what a killed attempt lost",
}
TAIL_SHARE = 8
"""A batch is nearly empty when it has at most 1/8 of the sequences of the segment's largest one."""
_PHASES = {"load": LOAD, "capture": CAPTURE, "write": WRITE, "finish": WRITE}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Nanoseconds of each step of a segment, [steps]. Steps overlap; these parts of them do not."""

    gap: np.ndarray
    """Since the last step ended, nothing had been scheduled."""
    exposed: np.ndarray
    """From there, or from the step's start, to its end; its device time is part of it, the rest is the host's."""
    device: np.ndarray
    places: dict[str, np.ndarray]
    """`device` divided: prefill, decode, tail, recompute, padding."""


def step_times(segment: Segment) -> StepTimes:
    """A step's device time is divided by its tokens, those of its padding included."""
    start, end = segment.column("start_ns").astype(np.int64), segment.column("end_ns").astype(np.int64)
    before = np.concatenate([start[:1], np.maximum.accumulate(end)[:-1]])
    gap = np.maximum(start - before, 0)
    exposed = np.maximum(end - np.maximum(start, before), 0)
    device = np.minimum(segment.column("forward_ms") * 1e6, exposed)
    prefill = segment.column("num_prefill_tokens").astype(np.int64)
    decode = segment.column("num_decode_tokens").astype(np.int64)
    padded = np.maximum(segment.column("padded_num_tokens").astype(np.int64), prefill + decode)
    recomputed = np.bincount(segment.sequences.step_row, recomputed_tokens(segment), len(start))
    is_tail = tail_steps(segment)
    of_token = np.where(is_tail, 0.0, device / np.maximum(padded, 1))
    places = {
        PREFILL: of_token * (prefill - recomputed),
        DECODE: of_token * decode,
        TAIL: np.where(is_tail, device, 0.0),
        RECOMPUTE: of_token * recomputed,
        PADDING: of_token * (padded - prefill - decode),
    }
    return StepTimes(gap=gap, exposed=exposed, device=device, places=places)


def recomputed_tokens(segment: Segment) -> np.ndarray:
    """[entries of `sequences`] Tokens whose KV the sequence had computed once before, and lost to a preemption."""
    flat = segment.sequences
    order = np.lexsort((flat.step_row, flat.seq_id))
    context, seq_id = flat.context_len[order], flat.seq_id[order]
    changes = np.ones(len(order), np.bool_)
    changes[1:] = seq_id[1:] != seq_id[:-1]
    # Lifting each sequence above the one before makes one running maximum of all of them.
    lift = np.cumsum(changes) * (int(context.max(initial=0)) + 1)
    reached = np.maximum.accumulate(context + lift) - lift
    before = np.concatenate([[0], reached[:-1]]) if len(order) else reached
    before = np.where(changes, 0, before)
    tokens = flat.num_tokens[order]
    again = np.empty(len(order), np.int64)
    again[order] = np.clip(np.minimum(before, context) - (context - tokens), 0, tokens)
    return again


def tail_steps(segment: Segment) -> np.ndarray:
    """[steps] Whether the step belongs to the end, where nothing waits and few sequences are left."""
    batch, waiting = segment.column("batch_size"), segment.column("num_waiting")
    full = (batch * TAIL_SHARE > batch.max(initial=0)) | (waiting > 0)
    last_full = np.flatnonzero(full)[-1] if full.any() else -1
    return np.arange(len(batch)) > last_full


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """From an attempt's start to the last thing known of it, in nanoseconds since the run's clock_zero."""

    start_ns: int
    end_ns: int
    generate_start_ns: int
    generate_end_ns: int

    @property
    def wall_ns(self) -> int:
        return self.end_ns - self.start_ns


def span(segment: Segment) -> Span:
    attempt = segment.attempt
    phases = {name: (start, end) for name, start, end in attempt.phases}
    first, last = attempt.started_ns, max((end for _, _, end in attempt.phases), default=attempt.started_ns)
    if segment.num_steps:
        last = max(last, int(segment.column("end_ns").max()))
    known_end = last
    if "generate" in phases and (attempt.is_sealed or not attempt.is_recorded):
        generate = phases["generate"]
    elif segment.num_steps:  # killed, or its disk failed: from its first step to its last recorded one
        generate = (int(segment.column("start_ns")[0]), int(segment.column("end_ns").max()))
    else:
        generate = (known_end, known_end)
    return Span(start_ns=first, end_ns=known_end, generate_start_ns=generate[0], generate_end_ns=generate[1])


def time_ledger(segments: list[Segment]) -> dict[str, float]:
    """Nanoseconds in each of PLACES; they sum to the attempts' wall time.

    Replicas run side by side: each place is their mean. The time between two attempts, when nothing ran, is no part.
    """
    total = dict.fromkeys(PLACES, 0.0)
    num_replicas = len({segment.replica for segment in segments})
    for segment in segments:
        for place, amount in _of_segment(segment).items():
            total[place] += amount / num_replicas
    return total


def _of_segment(segment: Segment) -> dict[str, float]:
    found = dict.fromkeys(PLACES, 0.0)
    whole = span(segment)
    windows = [(start, end, _PHASES[name]) for name, start, end in segment.attempt.phases if name in _PHASES]
    generating = HOST if segment.attempt.is_recorded else UNRECORDED
    windows.append((whole.generate_start_ns, whole.generate_end_ns, generating))
    cursor = whole.start_ns
    for start, end, place in sorted(windows):
        begin = max(start, cursor)
        found[place] += max(end - begin, 0)
        cursor = max(cursor, end)
    if segment.num_steps:
        times = step_times(segment)
        for place, amounts in times.places.items():
            found[place] += float(amounts.sum())
        found[HOST] -= float(times.device.sum())
    found[OTHER] = whole.wall_ns - sum(found.values())
    return found
