"""What the rounds of the workload benchmark amount to: a table for people and one line of JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jobs.roofline import NO_BOUND


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Summed over the steps of a round."""

    num_steps: int
    host_ms: float
    """Scheduling, preparing and postprocessing; on a GPU much of it passes while the device works."""
    forward_ms: float
    """The device's."""
    num_preemptions: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A workload's prompts answered once."""

    seed: int
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    recorder: bool = False
    recorder_close_s: float | None = None
    """What the recorder still wrote afterwards; not part of `seconds`."""
    steps: StepTotals | None = None
    """None for a peer, whose steps nobody sees."""
    bound_s: float | None = None
    """None on a device whose speed is not known."""
    cascade_bound_s: float | None = None
    """With a shared prefix read once for all sequences; None where there is none."""

    @property
    def output_tok_s(self) -> float:
        return self.num_output_tokens / self.seconds

    @property
    def all_tok_s(self) -> float:
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds

    def facts(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 4),
            "recorder": self.recorder,
            "output_tok_s": round(self.output_tok_s, 1),
            "bound_s": _rounded(self.bound_s, 6),
            "recorder_close_s": _rounded(self.recorder_close_s),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadResult:
    """The timed rounds of a workload, and the settings they ran with."""

    name: str
    counts_input: bool
    """Whether its speed is told in prompt and output tokens together."""
    settings: dict[str, object]
    rounds: Sequence[Round]

    @property
    def told(self) -> list[Round]:
        """Those that its figures come from: with the recorder, where any ran with it."""
        return [r for r in self.rounds if r.recorder] or list(self.rounds)

    @property
    def recorder_ratio(self) -> float | None:
        """Speed with the recorder over speed without: the median of the pairs; None without both."""
        on = [r.output_tok_s for r in self.rounds if r.recorder]
        off = [r.output_tok_s for r in self.rounds if not r.recorder]
        return median(a / b for a, b in zip(on, off, strict=True)) if on and off else None

    def facts(self) -> dict[str, Any]:
        rounds = self.told
        off = [r.output_tok_s for r in self.rounds if not r.recorder]
        steps = [(r, r.steps) for r in rounds if r.steps is not None]
        return {
            "output_tok_s": round(median(r.output_tok_s for r in rounds), 1),
            "output_tok_s_best": round(max(r.output_tok_s for r in rounds), 1),
            "all_tok_s": round(median(r.all_tok_s for r in rounds), 1),
            "all_tok_s_best": round(max(r.all_tok_s for r in rounds), 1),
            "unit": "all tok/s" if self.counts_input else "output tok/s",
            "bound_tok_s": self._speed([r.bound_s for r in rounds]),
            "of_bound": self._fraction([r.bound_s for r in rounds]),
            "cascade_bound_tok_s": self._speed([r.cascade_bound_s for r in rounds]),
            "cascade_of_bound": self._fraction([r.cascade_bound_s for r in rounds]),
            "steps": median(s.num_steps for _, s in steps) if steps else None,
            "host_ms_per_step": _rounded(median(s.host_ms / s.num_steps for _, s in steps) if steps else None),
            "forward_ms": _rounded(median(s.forward_ms for _, s in steps) if steps else None, 1),
            "wall_ms": round(median(r.seconds for r in rounds) * 1e3, 1),
            "device_idle": _rounded(median(1 - s.forward_ms / r.seconds / 1e3 for r, s in steps) if steps else None),
            "preemptions": sum(s.num_preemptions for _, s in steps) if steps else None,
            "cached_prompt_tokens": median(s.num_cached_tokens for _, s in steps) if steps else None,
            "recorder_on_over_off": _rounded(self.recorder_ratio),
            "output_tok_s_recorder_off": round(median(off), 1) if off and self.recorder_ratio is not None else None,
            "settings": self.settings,
            "rounds": [r.facts() for r in self.rounds],
        }

    def _speed(self, bounds: list[float | None]) -> float | None:
        """That the bounds stand for, in the tokens that the workload is told in."""
        speeds = [
            (r.num_output_tokens + (r.num_prompt_tokens if self.counts_input else 0)) / bound
            for bound, r in zip(bounds, self.told, strict=True)
            if bound is not None
        ]
        return round(median(speeds), 1) if speeds else None

    def _fraction(self, bounds: list[float | None]) -> float | None:
        shares = [bound / r.seconds for bound, r in zip(bounds, self.told, strict=True) if bound is not None]
        return round(median(shares), 4) if shares else None


def table(results: Sequence[WorkloadResult], device: str) -> str:
    """A line for each workload; below it, what a column cannot hold."""
    facts = [(result, result.facts()) for result in results]
    rows = [HEAD, *(_row(result.name, f) for result, f in facts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    for result, f in facts:
        if result.counts_input:
            lines.append(
                f"{result.name}: counted in prompt and output tokens; output alone {f['output_tok_s']:,.0f} tok/s"
            )
        if f["cascade_of_bound"] is not None:
            lines.append(
                f"{result.name}: with the common prefix read once for all sequences the bound is "
                f"{f['cascade_bound_tok_s']:,.0f} tok/s, of which this is {f['cascade_of_bound']:.1%}"
            )
    if any(f["bound_tok_s"] is None for _, f in facts):
        lines.append(f"{device}: {NO_BOUND}")
    return "\n".join(lines)


HEAD = (
    "workload",
    "tok/s",
    "best",
    "bound",
    "of it",
    "steps",
    "host ms/step",
    "device ms",
    "wall ms",
    "idle",
    "on/off",
)


def _row(name: str, f: dict[str, Any]) -> tuple[str, ...]:
    kind = "all_tok_s" if f["unit"].startswith("all") else "output_tok_s"
    return (
        name,
        _shown(f[kind], ",.0f"),
        _shown(f[f"{kind}_best"], ",.0f"),
        _shown(f["bound_tok_s"], ",.0f"),
        _shown(f["of_bound"], ".1%"),
        _shown(f["steps"], ",.0f"),
        _shown(f["host_ms_per_step"], ".3f"),
        _shown(f["forward_ms"], ",.0f"),
        _shown(f["wall_ms"], ",.0f"),
        _shown(f["device_idle"], ".1%"),
        _shown(f["recorder_on_over_off"], ".3f"),
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
