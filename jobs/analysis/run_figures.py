"""What a run amounts to, counted from its records."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jobs.analysis import tables
from jobs.analysis.latencies import Latencies
from jobs.analysis.pauses import of_steps, pauses_before
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.segments import Segment, segments
from jobs.analysis.time_ledger import DECODE, PLACES, StepTimes, recomputed_tokens, span, step_times, time_ledger


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Figures over all replicas and attempts."""

    run: RecordedRun
    segments: list[Segment] = field(default_factory=list)

    @classmethod
    def of(cls, run: RecordedRun) -> "RunFigures":
        return cls(run=run, segments=list(segments(run)))

    @cached_property
    def ledger(self) -> dict[str, float]:
        return time_ledger(self.segments)

    @cached_property
    def meanings(self) -> dict[str, str]:
        """What each place of the ledger is, and of the decode time how much was that of steps in halves."""
        pairs = list(zip(self.segments, self.times, strict=True))
        halves = sum(float(times.places[DECODE][segment.in_halves].sum()) for segment, times in pairs)
        if not halves:
            return PLACES
        whole = sum(float(times.places[DECODE].sum()) for times in self.times)
        return PLACES | {DECODE: f"{PLACES[DECODE]}, {halves / whole:.0%} of it in halves"}

    @property
    def wall_s(self) -> float:
        return sum(self.ledger.values()) / 1e9

    @cached_property
    def times(self) -> list[StepTimes]:
        return [step_times(segment) for segment in self.segments]

    @cached_property
    def latencies(self) -> list[Latencies]:
        return [Latencies(segment=segment) for segment in self.segments]

    @cached_property
    def generate_s(self) -> float:
        """Of the attempts that were recorded, as the tokens are."""
        recorded = [segment for segment in self.segments if segment.attempt.is_recorded]
        spans = [span(segment) for segment in recorded if segment.replica == self.segments[0].replica]
        return sum(found.generate_end_ns - found.generate_start_ns for found in spans) / 1e9

    @cached_property
    def steps_s(self) -> float:
        """From the first step's start to the last one's end, as a run itself takes its speed; of all attempts."""
        found: dict[int, tuple[int, int]] = {}
        for segment in self.segments:
            if segment.num_steps:
                first, last = int(segment.column("start_ns").min()), int(segment.column("end_ns").max())
                before = found.get(segment.attempt.number, (first, last))
                found[segment.attempt.number] = min(first, before[0]), max(last, before[1])
        return sum(last - first for first, last in found.values()) / 1e9

    @cached_property
    def pauses(self) -> dict[int, int]:
        return pauses_before(self.segments)

    @property
    def paused_s(self) -> float:
        """Between attempts; no part of the wall time."""
        return max(self.pauses.values(), default=0) / 1e9

    @cached_property
    def step_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """[steps] Start and end of each in nanoseconds, the pauses between attempts left out, for plots over time."""
        paused = of_steps(self.pauses, self.run.steps["attempt"].to_numpy())
        return self.run.step_column("start_ns") - paused, self.run.step_column("end_ns") - paused

    @property
    def num_steps(self) -> int:
        return self.run.steps.num_rows

    @cached_property
    def num_sampled_tokens(self) -> int:
        """Thrown-away ones not counted."""
        dropped, _ = tables.lists(self.run.steps, "dropped_seq_ids")
        return int(self.run.step_sequences.sampled.sum() - dropped.sum())

    @property
    def num_dropped_tokens(self) -> int:
        return int(tables.lists(self.run.steps, "dropped_seq_ids")[0].sum())

    @property
    def tokens_per_s(self) -> float:
        return self.num_sampled_tokens / self.steps_s if self.steps_s else 0.0

    @cached_property
    def num_prompt_tokens(self) -> int:
        return int(tables.ints(self.run.requests, "num_prompt_tokens").sum())

    @cached_property
    def num_cached_prompt_tokens(self) -> int:
        """When their sequence first ran."""
        return int(tables.ints(self.run.requests, "num_cached_tokens").sum())

    @property
    def hit_rate(self) -> float:
        return self.num_cached_prompt_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def tokens_saved(self) -> int:
        """Taken from the prefix cache in all steps, also by sequences that had been preempted."""
        return int(self.run.step_column("num_cached_tokens").sum())

    @property
    def num_preemptions(self) -> int:
        return int(self.run.step_column("num_preempted").sum())

    @cached_property
    def num_recomputed_tokens(self) -> int:
        return int(sum(recomputed_tokens(segment).sum() for segment in self.segments))

    @cached_property
    def weights(self) -> np.ndarray:
        """[steps] Exposed nanoseconds, for means over time."""
        weights = np.zeros(self.num_steps)
        for segment, times in zip(self.segments, self.times, strict=True):
            weights[segment.step_rows] = times.exposed + times.gap
        return weights

    def mean_over_time(self, name: str) -> float:
        return float(np.average(self.run.step_column(name), weights=self.weights)) if self.weights.sum() else 0.0

    @cached_property
    def kv_use(self) -> np.ndarray:
        """[steps] Share of the KV blocks that were in use after the step."""
        used = self.run.step_column("used_blocks")
        return used / np.maximum(used + self.run.step_column("free_blocks"), 1)

    @property
    def mean_kv_use(self) -> float:
        return float(np.average(self.kv_use, weights=self.weights)) if self.weights.sum() else 0.0

    @property
    def peak_kv_use(self) -> float:
        return float(self.kv_use.max(initial=0.0))

    def percentile(self, name: str, q: float) -> float:
        """Of a column of Latencies, in milliseconds; NaN where no request got so far."""
        found = np.concatenate([getattr(latencies, name) for latencies in self.latencies])
        found = found[~np.isnan(found)]
        return float(np.percentile(found, q)) if len(found) else float("nan")

    def facts(self) -> dict[str, float]:
        """The figures that are compared between runs."""
        places = {f"{name.replace(' ', '_')}_s": amount / 1e9 for name, amount in self.ledger.items()}
        return {
            "wall_s": self.wall_s,
            "generate_s": self.generate_s,
            "steps_s": self.steps_s,
            "output_tokens": self.num_sampled_tokens,
            "tokens_per_s": self.tokens_per_s,
            "num_steps": self.num_steps,
            "mean_batch": self.mean_over_time("batch_size"),
            "mean_kv_use": self.mean_kv_use,
            "prefix_hit_rate": self.hit_rate,
            "preemptions": self.num_preemptions,
            "ttft_p50_ms": self.percentile("to_first_token", 50),
            "ttft_p99_ms": self.percentile("to_first_token", 99),
            "token_p50_ms": self.percentile("per_token", 50),
            **places,
        }
