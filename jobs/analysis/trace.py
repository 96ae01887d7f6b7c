"""Writes a run as a trace for the Perfetto viewer."""

from collections.abc import Mapping

import msgspec

from jobs.analysis.output_file import write_output
from jobs.analysis.program import EXIT_DONE, Analysis
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.run_paths import find_run
from jobs.analysis.terminal import show
from jobs.analysis.trace_events import trace_events

NAME = "trace.json"


def _run(values: Mapping[str, str]) -> int:
    run = RecordedRun(find_run("run", values["run"]))
    run.require_records()
    encode = msgspec.json.Encoder().encode
    events = b",\n".join(encode(event) for event in trace_events(run))
    path = write_output(run.path / NAME, b'{"displayTimeUnit":"ms","traceEvents":[\n' + events + b"\n]}\n")
    if run.note_on_unrecorded:
        show([run.note_on_unrecorded])
    show([f"{path}  {path.stat().st_size / 1e6:.1f} MB; open it in the Perfetto viewer"])
    return EXIT_DONE


ANALYSIS = Analysis(
    about=f"Writes {NAME} into the run directory: tracks for scheduler, device, rows and KV blocks.",
    keys={"run": "a run directory"},
    required=["run"],
    run=_run,
)
