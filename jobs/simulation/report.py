"""What a simulation says on the terminal."""

from collections.abc import Sequence

import numpy as np

from jobs.simulation.cost_fitting import FittedCosts
from jobs.simulation.fitting import Fit
from jobs.simulation.grid import Choice
from jobs.simulation.predictor import Prediction, Predictor
from jobs.simulation.recorded_run import RecordedRun
from jobs.simulation.settings import KEYS, Settings

POOR_STEP, POOR_TOTAL = 0.25, 0.10
"""Errors of held-out steps above which predictions come with a warning."""


def fit_lines(predictor: Predictor) -> list[str]:
    """The costs and how good they are."""
    costs, run = predictor.costs, predictor.run
    model = costs.model
    lines = [
        f"fitted on {costs.num_steps:,} steps of {run.directory}; "
        + ("the next step is scheduled while one runs" if run.facts.lookahead else "one step after the other"),
        f"  forward ms      {_formula(model.forward)}",
        f"  beside it       {_formula(model.gap)}",
        f"  schedule        {_formula(model.schedule)}",
        f"  prepare         {_formula(model.prepare)}",
        f"  postprocess     {_formula(model.postprocess)}",
        f"  between steps   {_formula(model.between)}",
    ]
    if costs.num_late_captures:
        lines.append(f"  late captures   {model.capture_ms:.1f} ms each, {costs.num_late_captures} in the run")
    if model.warm_up_ms:
        lines.append(f"  warm-up         {model.warm_up_ms:.0f} ms in all")
    lines.append(f"  error held out  {_error(costs)}; {costs.num_outliers} outliers")
    if costs.error.mape > POOR_STEP or abs(costs.error.total) > POOR_TOTAL:
        lines.append(
            f"  warning: the costs fit these steps poorly (good is a step within {POOR_STEP:.0%}, the total within "
            f"{POOR_TOTAL:.0%}); what is predicted with them may be as far off"
        )
    lines.append(
        f"  calibrated      {predictor.calibration:.3f} x the time of all steps: what this run took, costs and stalls"
    )
    if costs.num_other_padding:
        lines.append(
            f"  note: {costs.num_other_padding:,} steps were padded otherwise than this version of nanovllm would"
        )
    return lines


def _formula(cost: Fit) -> str:
    terms = [
        f"{coefficient:.3g} x {name}"
        for name, coefficient in zip(cost.names, cost.coefficients, strict=True)
        if coefficient > 1e-12  # what a solver leaves of nothing
    ]
    return " + ".join(terms) or "0"


def _error(costs: FittedCosts) -> str:
    if np.isnan(costs.error.mape):
        return "unknown: too few steps"
    return f"a step's forward time {costs.error.mape:.1%} on average, the total {costs.error.total:+.2%}"


def grid_table(predictor: Predictor, choices: Sequence[Choice], predictions: Sequence[Prediction | None]) -> list[str]:
    """The recorded configuration first; `predictions` are None where a choice cannot be."""
    run, same = predictor.run, predictor.recorded
    several = f" in {run.num_attempts} attempts" if run.num_attempts > 1 else ""
    rows = [_HEAD, [f"as recorded, measured{several}", f"{run.steps_seconds:.2f}", *_measured(run)]]
    rows.append(["as recorded, predicted", *_cells(same, same)])
    notes: list[str] = []
    for choice, prediction in zip(choices, predictions, strict=True):
        if prediction is None:
            notes.append(f"{choice.words}: cannot be: {choice.complaint}")
            continue
        marks = _marks(predictor, prediction, choice.words, notes)
        rows.append([choice.words + marks, *_cells(prediction, same)])
    return [*_aligned(rows), *notes, *_limits(run.facts.settings, choices)]


_HEAD = ["configuration", "steps s", "job s", "output tok/s", "speed", "hits", "preempted", "p50 s", "p99 s"]


def _measured(run: RecordedRun) -> list[str]:
    requests = run.requests
    ended = (requests["finished_ns"].to_numpy() - requests["arrived_ns"].to_numpy()) / 1e9
    tokens = int(requests["num_output_tokens"].to_numpy().sum())
    prompts = int(requests["num_prompt_tokens"].to_numpy().sum())
    return [
        _job_seconds(run),
        f"{tokens / run.steps_seconds:,.0f}",
        "",
        f"{requests['num_cached_tokens'].to_numpy().sum() / max(prompts, 1):.1%}",
        f"{run.column('num_preempted').sum():,}",
        _quantile(ended, 0.5),
        _quantile(ended, 0.99),
    ]


def _quantile(seconds: np.ndarray, quantile: float) -> str:
    """Of the rows that have finished, whose time is not NaN."""
    finished = seconds[~np.isnan(seconds)]
    return f"{np.quantile(finished, quantile):.2f}" if len(finished) else "-"


def _job_seconds(run: RecordedRun) -> str:
    """Of the attempts whose steps stand beside it."""
    return "?" if run.job_seconds is None else f"{run.job_seconds:.2f}"


def _cells(prediction: Prediction, same: Prediction) -> list[str]:
    outcome = prediction.outcome
    latencies = prediction.latencies_s
    faster = prediction.output_tokens_per_s / same.output_tokens_per_s if same.output_tokens_per_s else None
    return [
        f"{prediction.steps_s:.2f}",
        f"{prediction.job_s:.2f}",
        f"{prediction.output_tokens_per_s:,.0f}",
        "-" if faster is None else f"{faster:.2f}x",
        f"{outcome.hit_rate:.1%}",
        f"{outcome.num_preemptions:,}",
        _quantile(latencies, 0.5),
        _quantile(latencies, 0.99),
    ]


def _marks(predictor: Predictor, prediction: Prediction, words: str, notes: list[str]) -> str:
    outcome, (most_rows, most_tokens) = prediction.outcome, predictor.most_recorded
    if outcome.refused:
        codes = ", ".join(f"{code} {count:,}" for code, count in outcome.refused.items())
        notes.append(f"{words}: {sum(outcome.refused.values()):,} rows would fail: {codes}")
    if outcome.num_shorter:
        notes.append(f"{words}: {outcome.num_shorter:,} rows would end before they did, at engine.max_model_len")
    beyond = outcome.most_rows > most_rows or outcome.most_tokens > most_tokens
    if not beyond:
        return ""
    note = f"*: has larger steps than the record, whose largest have {most_rows:,} rows and {most_tokens:,} tokens"
    if note not in notes:
        notes.insert(0, note)
    return " *"


def _limits(recorded: Settings, choices: Sequence[Choice]) -> list[str]:
    if any(choice.settings and choice.settings.block_size != recorded.block_size for choice in choices):
        return [
            f"kv.block_size: what the kernels themselves gain or lose at other sizes than {recorded.block_size} "
            "is not in the record"
        ]
    return []


def best_lines(choices: Sequence[Choice], predictions: Sequence[Prediction | None], same: Prediction) -> list[str]:
    """The fastest configuration that answers as many rows as the recorded one, and the words for it."""
    answered = same.outcome.num_output_tokens
    found = [
        (prediction.steps_s, choice.words)
        for choice, prediction in zip(choices, predictions, strict=True)
        if prediction is not None and prediction.outcome.num_output_tokens >= answered
    ]
    if not found:
        return ["best: none of these answers every row in full; the recorded configuration does"]
    seconds, words = min(found, key=lambda each: each[0])
    if seconds >= same.steps_s:
        return [f"best: the recorded configuration ({same.steps_s:.2f} s); of these {words} ({seconds:.2f} s)"]
    return [f"best: {words}", f"      {seconds:.2f} s instead of {same.steps_s:.2f}, {same.steps_s / seconds:.2f}x"]


def against_table(runs: Sequence[RecordedRun], predictions: Sequence[Prediction], events: Sequence[str]) -> list[str]:
    """Measured and predicted, side by side; `events` says of each run how its block events compare."""
    head = ["run", "steps s: measured", "predicted", "error", "job s", "predicted", "tok/s", "predicted"]
    rows = [[*head, "preempted", "predicted", "block events"]]
    for run, prediction, same in zip(runs, predictions, events, strict=True):
        measured = run.steps_seconds
        tokens = int(run.requests["num_output_tokens"].to_numpy().sum())
        rows.append(
            [
                str(run.directory),
                f"{measured:.3f}",
                f"{prediction.steps_s:.3f}",
                f"{prediction.steps_s / measured - 1:+.1%}",
                _job_seconds(run),
                f"{prediction.job_s:.2f}",
                f"{tokens / measured:,.0f}",
                f"{prediction.output_tokens_per_s:,.0f}",
                f"{run.column('num_preempted').sum():,}",
                f"{prediction.outcome.num_preemptions:,}",
                same,
            ]
        )
    return _aligned(rows)


def settings_line(settings: Settings) -> str:
    return " ".join(f"{key}={getattr(settings, key.partition('.')[2])}".replace("True", "true") for key in KEYS)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
