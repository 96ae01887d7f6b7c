"""What could be done better, in words: the key to change, and the evidence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jobs.analysis import tables
from jobs.analysis.run_figures import RunFigures
from jobs.analysis.time_ledger import CAPTURE, HOST, LOAD, PADDING, RECOMPUTE, TAIL, span
from jobs.run_lock import is_locked

MOST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    text: str
    """What is the case, and the key to change."""
    evidence: str
    share: float
    """Of the wall time, about what it costs; findings are sorted by it."""

    def __str__(self) -> str:
        return f"{self.text} [{self.evidence}]"


class Findings:
    """Each rule yields what it finds, or nothing."""

    def __init__(self, figures: RunFigures) -> None:
        self._figures = figures
        self._ledger = figures.ledger
        self._wall = max(sum(self._ledger.values()), 1.0)
        self._engine = figures.run.engine
        column = figures.run.step_column
        self._weights = figures.weights
        self._decodes = column("num_decode_tokens") > 0
        self._waiting = column("num_waiting")
        self._batch = column("batch_size")
        self._tokens = column("num_prefill_tokens") + column("num_decode_tokens")
        self._used = figures.kv_use
        self._max_num_seqs = self._engine.get("max_num_seqs")
        self._max_tokens = self._engine.get("max_num_batched_tokens")

    def top(self) -> list[Finding]:
        rules: tuple[Callable[[], Iterator[Finding]], ...] = (
            self._kv_full,
            self._batch_limited,
            self._budget_limited,
            self._recompute,
            self._tail,
            self._host,
            self._padding,
            self._loading,
            self._prefixes,
            self._starved,
            self._failures,
        )
        found = [finding for rule in rules for finding in rule()] if self._figures.num_steps else []
        return sorted(found, key=lambda finding: -finding.share)[:MOST]

    def _share(self, place: str) -> float:
        return self._ledger[place] / self._wall

    def _of_decode(self, chosen: np.ndarray) -> float:
        """Share of the decoding time in which it is so."""
        decoding = self._weights[self._decodes].sum()
        return float(self._weights[self._decodes & chosen].sum() / decoding) if decoding else 0.0

    def _of_wall(self, chosen: np.ndarray) -> float:
        return float(self._weights[chosen].sum() / self._wall)

    @property
    def _is_full_of_slots(self) -> np.ndarray:
        """A few slots may be held by rows whose last step is under way."""
        return self._batch >= 0.95 * (self._max_num_seqs or np.inf)

    @property
    def _is_full_of_tokens(self) -> np.ndarray:
        return self._tokens >= (self._max_tokens or np.inf)

    @property
    def _is_kv_full(self) -> np.ndarray:
        """A row waits though slots and the step's tokens are not used up: then the scheduler lacks blocks, free ones
        or those that it keeps back for the rows that grow."""
        return (self._waiting > 0) & ~self._is_full_of_slots & ~self._is_full_of_tokens

    @property
    def _kv_key(self) -> str:
        """What decides how many blocks there are."""
        given = ((self._figures.run.manifest.get("config") or {}).get("kv") or {}).get("num_blocks")
        return "kv.memory_fraction" if given is None else f"kv.num_blocks={given}"

    def _kv_full(self) -> Iterator[Finding]:
        share, preemptions = self._of_decode(self._is_kv_full), self._figures.num_preemptions
        if share >= 0.1:
            yield Finding(
                text=f"KV full for {share:.0%} of decode: raise {self._kv_key}"
                f"{' or lower engine.max_num_seqs' if preemptions else ''}",
                evidence=f"{self._figures.run.num_blocks:,} blocks, in use {self._figures.mean_kv_use:.0%} on average, "
                f"{self._figures.peak_kv_use:.0%} at most; {preemptions:,} preemptions",
                share=self._of_wall(self._is_kv_full) / 2,
            )

    def _batch_limited(self) -> Iterator[Finding]:
        if self._max_num_seqs is None:
            return
        limited = (self._waiting > 0) & self._is_full_of_slots & (self._used < 0.7)
        share = self._of_decode(limited)
        if share >= 0.2:
            yield Finding(
                text=f"the batch was full for {share:.0%} of decode and KV blocks were free: raise engine.max_num_seqs",
                evidence=f"engine.max_num_seqs={self._max_num_seqs}, KV in use {self._figures.mean_kv_use:.0%} on "
                f"average; {self._waiting.max():,} rows waited",
                share=self._of_wall(limited) / 3,
            )

    def _budget_limited(self) -> Iterator[Finding]:
        if self._max_tokens is None:
            return
        limited = self._is_full_of_tokens & (self._waiting > 0)
        share = self._of_wall(limited)
        if share >= 0.3 and self._max_tokens < 8192:
            yield Finding(
                text=f"{share:.0%} of the time steps were full of prompt tokens: raise engine.max_num_batched_tokens",
                evidence=f"{int(limited.sum()):,} of {len(limited):,} steps had all of "
                f"engine.max_num_batched_tokens={self._max_tokens}",
                share=share / 4,
            )

    def _recompute(self) -> Iterator[Finding]:
        share = self._share(RECOMPUTE)
        if share >= 0.02:
            yield Finding(
                text=f"{share:.0%} of the time went into computing preempted rows again: raise {self._kv_key} or lower "
                "engine.max_num_seqs",
                evidence=f"{self._figures.num_preemptions:,} preemptions, "
                f"{self._figures.num_recomputed_tokens:,} tokens computed twice",
                share=share,
            )

    def _tail(self) -> Iterator[Finding]:
        share = self._share(TAIL)
        if share >= 0.05:
            longest = int(tables.ints(self._figures.run.requests, "num_output_tokens").max(initial=0))
            yield Finding(
                text=f"{share:.0%} of the time a nearly empty batch waited for the last rows: put long rows first, or "
                "lower sampling.max_tokens",
                evidence=f"at most {int(self._batch.max()) // 8} of {int(self._batch.max())} sequences; the longest "
                f"output has {longest:,} tokens",
                share=share,
            )

    def _host(self) -> Iterator[Finding]:
        """Only where work of the host's own makes most of the gaps, and something can be done about it."""
        share = (self._ledger[HOST] - self._first_wait_ns) / self._wall
        column = self._figures.run.step_column
        parts = {name: float(column(f"{name}_ms").sum()) for name in ("schedule", "prepare", "postprocess")}
        key = self._against_gaps()
        if share < 0.1 or key is None or sum(parts.values()) * 1e6 < share * self._wall / 2:
            return
        yield Finding(
            text=f"the device had nothing to do for {share:.0%} of the time: {key}",
            evidence="; ".join(f"{name} {amount / 1e3:.2f} s" for name, amount in parts.items())
            + f" over {self._figures.num_steps:,} steps, partly beside the device",
            share=share,
        )

    @property
    def _first_wait_ns(self) -> float:
        """From the start of generating to the first step, in which the first rows are read and tokenised."""
        segments = [segment for segment in self._figures.segments if segment.num_steps]
        waits = [max(segment.column("start_ns")[0] - span(segment).generate_start_ns, 0) for segment in segments]
        return float(sum(waits)) / max(len({segment.replica for segment in self._figures.segments}), 1)

    def _against_gaps(self) -> str | None:
        if self._engine.get("enforce_eager") and self._figures.run.manifest.get("device") != "cpu":
            return "set engine.enforce_eager=false, so that steps run as CUDA graphs"
        if self._of_decode(self._is_kv_full) >= 0.1:
            return f"raise {self._kv_key}, so that more rows share a step"
        if self._of_decode(self._is_full_of_slots & (self._waiting > 0)) >= 0.1:
            return "raise engine.max_num_seqs, so that more rows share a step"
        return None

    def _padding(self) -> Iterator[Finding]:
        share = self._share(PADDING)
        if share >= 0.05:
            padded = self._figures.run.step_column("padded_num_tokens")
            yield Finding(
                text=f"{share:.0%} of the time is the padding of steps to their CUDA graphs: choose "
                "engine.max_num_seqs and engine.max_num_batched_tokens near what steps really have",
                evidence=f"{int(padded.sum()):,} tokens run for {int(self._tokens.sum()):,} real ones",
                share=share,
            )

    def _loading(self) -> Iterator[Finding]:
        share = self._share(LOAD) + self._share(CAPTURE)
        if share >= 0.4:
            yield Finding(
                text=f"loading and capturing took {share:.0%} of the time: put more rows into one run (input takes a "
                "glob; reader.limit bounds it)",
                evidence=f"{self._ledger[LOAD] / 1e9:.1f} s load, {self._ledger[CAPTURE] / 1e9:.1f} s capture, "
                f"{self._figures.generate_s:.1f} s generate",
                share=share / 4,
            )

    def _prefixes(self) -> Iterator[Finding]:
        run = self._figures.run
        shared = int(tables.ints(run.requests, "shared_prefix_tokens", 0).sum())
        cached, total = self._figures.num_cached_prompt_tokens, max(self._figures.num_prompt_tokens, 1)
        missed = shared - cached
        if missed / total < 0.1:
            return
        prefill = self._share("prefill") * missed / max(total - cached, 1)
        evicted = int(np.count_nonzero(tables.codes(run.block_events, "event", ("evict",)) == 0))
        size = self._engine.get("block_size") or 16
        lost_to_size = int((tables.ints(run.requests, "shared_prefix_tokens", 0) % size).sum())
        evidence = f"{shared:,} of {total:,} prompt tokens begin like an earlier row's, {cached:,} came from the cache"
        if self._engine.get("enable_prefix_caching") is False:
            key = "set kv.prefix_caching=true"
        elif lost_to_size > missed / 2 and size > 16:
            key, evidence = "lower kv.block_size", f"{evidence}; {lost_to_size:,} do not fill a block of {size}"
        elif evicted:
            key = f"raise {self._kv_key}, or sort the input so that rows with the same beginning are neighbours"
            evidence = f"{evidence}; {evicted:,} cached blocks were evicted"
        else:
            key = "lower engine.max_num_batched_tokens: rows that start in one step cannot share what it computes"
        yield Finding(
            text=f"{missed / total:.0%} of the prompt tokens were shared and computed anyway: {key}",
            evidence=evidence,
            share=prefill,
        )

    def _starved(self) -> Iterator[Finding]:
        """Few rows run, none waits, and more arrive later: the input is what is slow."""
        figures = self._figures
        slots = self._max_num_seqs or int(self._batch.max(initial=1))
        last_arrival = int(tables.ints(figures.run.requests, "arrived_ns").max(initial=0))
        early = figures.run.step_column("end_ns") < last_arrival
        starved = early & (self._waiting == 0) & (self._batch < slots / 2)
        share = self._of_wall(starved)
        if share >= 0.2:
            yield Finding(
                text=f"for {share:.0%} of the time no row waited and the batch was under half full, before the input "
                "ended: rows came too slowly; give input=FILE in place of a pipe",
                evidence=f"mean batch {figures.mean_over_time('batch_size'):.1f} of {slots}",
                share=share / 2,
            )

    def _failures(self) -> Iterator[Finding]:
        counts = self._figures.run.manifest.get("counts") or {}
        if counts.get("failed"):
            codes = ", ".join(f"{code} {number:,}" for code, number in counts["failed_by_code"].items())
            yield Finding(
                text=f"{counts['failed']:,} of {counts['rows']:,} rows failed: failures.jsonl has the reasons; "
                "reader.max_failures bounds them",
                evidence=codes,
                share=0.01,
            )


def unfinished(figures: RunFigures) -> str | None:
    """What a reader must know of a run that is not complete, or of one that took several attempts."""
    run, attempts = figures.run, figures.run.attempts
    killed = [attempt.number for attempt in attempts if not attempt.has_ended]
    parts = []
    if len(attempts) > 1:
        parts.append(f"{len(attempts)} attempts")
    if killed:
        last = max((span(segment).end_ns for segment in figures.segments), default=0)
        if killed[-1] == attempts[-1].number and is_locked(run.path):
            parts.append(f"attempt {killed.pop()} is still running")
        several = "s" if len(killed) > 1 else ""
        if killed:
            parts.append(f"attempt{several} {', '.join(map(str, killed))} did not end by itself")
        if not run.is_complete:
            parts.append(f"the records end {last / 1e9:.1f} s after the start")
    parts += [
        f"the records of attempt {attempt.number} were not written to their end"
        for attempt in attempts
        if attempt.has_ended and attempt.is_recorded and attempt.phases_have("generate") and not attempt.is_sealed
    ]
    if run.note_on_unrecorded:
        parts.append(run.note_on_unrecorded)
    return "; ".join(parts) or None
