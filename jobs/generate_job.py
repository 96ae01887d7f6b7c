"""The generate job: answers every row of an input file and records every step."""

import contextlib
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.batch_output import BatchForm
from jobs.command import EXIT_COMPLETE, EXIT_FAILED, EXIT_ROWS_FAILED, Command, Run, complain
from jobs.config import FREE_KEYS, OPENAI_BATCH, GenerateConfig, to_llm_config
from jobs.figures import Figures
from jobs.file_hashes import FileHashes
from jobs.generate_loop import GenerateLoop
from jobs.input_paths import resolve_paths
from jobs.journal import Journal, JournalError
from jobs.manifest import FAILED, Manifest
from jobs.network_disk import remote_type
from jobs.progress import Progress
from jobs.progress_file import ProgressFile
from jobs.reader import RowReader, check_input
from jobs.ready_rows import ReadyRows, weight
from jobs.record_tables import RecordTables
from jobs.recorder import ParquetRecorder
from jobs.results import Results, verified_counts
from jobs.resume import Resuming
from jobs.row_feed import RowFeed
from jobs.run_dir import RUN_LOG
from jobs.stop import StopRequest
from jobs.summary import show, summary
from jobs.turns import GivingWay, Turns
from jobs.usage import UsageError
from jobs.watchdog import Watchdog
from jobs.writer import check_keep
from nanovllm.errors import ModelError, SettingError
from nanovllm.models.checkpoint import check_checkpoint
from nanovllm.models.model_config import parse_config
from nanovllm.models.source import ModelSource, resolve_model

if TYPE_CHECKING:
    from nanovllm.assembly import Assembly
    from nanovllm.engine.llm_engine import LLMEngine

    Assemble = Callable[[GenerateConfig, Run, Figures, ModelSource], Assembly]

_logger = logging.getLogger(__name__)

SMALL_MODEL = 20_000_000
"""Weights below which one CPU thread is used: a second gains up to a half on an idle machine, but its barriers, one or
two for each small operation, cost a factor of ten once another process wants a core (2 cores, 2026-11-23: 1,399 output
tok/s against 908 when idle, 61 against 736 beside one busy process, on the embedded model)."""
GPU_WATCHDOG_S = 300.0
CPU_WATCHDOG_S = 3600.0
"""A step of 8,192 prompt tokens of a model of 4 billion weights takes a quarter of an hour on two cores."""
FEED_PATIENCE_S = 10.0
"""For the rows that are being tokenised when a run ends early."""
BUNDLED_PROMPTS = Path(__file__).parent / "data" / "tiny_prompts.jsonl"


def input_of(config: GenerateConfig) -> str:
    return config.input or str(BUNDLED_PROMPTS)


def check(config: GenerateConfig) -> None:
    """Looks at input and model as far as that goes in milliseconds and without torch."""
    check_keep(config.writer.keep)
    check_input(
        input_of(config),
        prompt=config.reader.prompt,
        system=config.reader.system,
        keep=config.writer.keep,
        batch_only=config.writer.format == OPENAI_BATCH,
    )
    source = resolve_model(config.model.path, config.model.revision, config.model.load_format)
    check_checkpoint(source)
    model = parse_config(source.config)
    most, asked = model.max_position_embeddings, config.engine.max_model_len
    if asked is not None and asked > most:
        raise ModelError(f"engine.max_model_len={asked}: must be at most {most}, the model's max_position_embeddings")
    for token_id in config.sampling.stop_token_ids or ():
        if not 0 <= token_id < model.vocab_size:
            raise ModelError(
                f"sampling.stop_token_ids={config.sampling.stop_token_ids}: {token_id} is no token of the model; "
                f"its ids are 0 to {model.vocab_size - 1}"
            )


def run(config: GenerateConfig, run: Run, assemble: "Assemble | None" = None) -> int:
    """Load, generate, finish; returns 3 when some rows have no answer.

    A run that is resumed begins with what its earlier attempts have acknowledged. `assemble` builds the engine.
    """
    source = resolve_model(config.model.path, config.model.revision, config.model.load_format)
    reader = _reader(config)
    _warn(run, reader)
    power, resumed = config.writer.durability == "power", run.manifest.attempt > 0
    run.manifest.record_attempt(recorder=config.recorder.enabled, sealed=False)
    figures = Figures()
    with ExitStack() as stack:
        results = stack.enter_context(
            Results(
                run.directory,
                config.writer.format,
                config.writer.keep,
                batch=_batch_form(config, run),
                power=power,
                resumed=resumed,
            )
        )
        results.check_against(run.manifest.get("counts"))
        turns = Turns()
        rows = RowFeed(results.missing(reader), config.engine.max_num_seqs, lambda row: row.weight, turns)
        stack.callback(rows.close)
        rows.wait_for_first(run.stop)  # what is no input at all shows before anything is made for it
        hashes = FileHashes(source, reader.paths, known=run.manifest.get("fingerprint"))
        run.manifest.record(fingerprint=hashes.fingerprint())
        if resumed:
            run.manifest.record_attempt(began_with=results.facts())
        assembly = (assemble or _assemble)(config, run, figures, source)
        _check_dtype(run, assembly)
        stack.callback(assembly.intake.close)
        ready_rows = ReadyRows(rows, assembly.intake, config.sampling)
        ready = RowFeed(ready_rows, config.engine.max_num_seqs, weight, turns)
        assembly.engine.runner = GivingWay(assembly.engine.runner, turns)
        stack.callback(_end_feeds, rows, ready)
        stages = [results.generations, results.failures]
        tables = _record_tables(config, run, power)
        journal = Journal([*tables, *stages], flush_s=config.recorder.flush_s)
        stack.callback(_note_end, assembly.engine, journal, run)
        stack.enter_context(closing(journal))
        assembly.engine.recorders += [ParquetRecorder(journal, table) for table in tables]
        run.manifest.record(
            device=assembly.device,
            engine=assembly.facts(),
            chat_template={"sha256": assembly.intake.chat_template_sha256},
        )
        num_rows, num_done = reader.count(), results.num_done
        watchdog = _watchdog(config, run, assembly)
        loop = GenerateLoop(
            assembly,
            ready,
            journal,
            results.generations,
            results.failures,
            figures,
            Progress(config.progress, num_rows, rows_before=num_done, file=ProgressFile(run.directory)),
            watchdog,
            source=", ".join(reader.paths),
            num_rows=None if num_rows is None else num_rows - num_done,
            input_is_awaited=lambda: not ready_rows.busy,
            in_step=all(Path(path).is_file() for path in reader.paths),
            max_failures=config.reader.max_failures,
        )
        try:
            with run.phase("generate"), run.stop.deferred(), watchdog, turns.of_loop():
                loop.run(run.stop, lambda: _note_hashes(hashes, run))
        except BaseException as error:
            _break_off(error, journal, results, run, lambda: _so_far(hashes, reader, loop, figures))
            raise
        with run.phase("write"):
            outputs = results.finish(sum(file.num_rows for file in reader.files))
        with run.phase("finish"):
            hashes.wait()
            run.manifest.record(
                **_so_far(hashes, reader, loop, figures),
                fingerprint=hashes.fingerprint(),
                output=[{**asdict(file), "path": file.path.name} for file in outputs],
            )
            results.remove_logs()  # the manifest names the final files: from here on they are the results
    answers = BUNDLED_PROMPTS if config.input is None else None
    show(summary(run.directory, loop.counts(), figures, outputs[0].path, answers, attempt=run.manifest.attempt))
    return EXIT_ROWS_FAILED if results.failures.num_flushed else EXIT_COMPLETE


def rehearse(config: GenerateConfig, stop: StopRequest) -> int:
    """dry_run=true: the run's exit code, as far as rows decide it, and on standard output what the run would need."""
    from jobs import dry_run

    source = resolve_model(config.model.path, config.model.revision, config.model.load_format)
    cache = dry_run.planned_cache(config, parse_config(source.config))
    rows = RowFeed(_reader(config), config.engine.max_num_seqs, weight=lambda row: row.weight)
    survey = dry_run.Survey()
    with ExitStack() as stack:
        stack.callback(rows.close)
        rows.wait_for_first(stop)
        intake = dry_run.intake_without_model(config, source, cache)
        stack.callback(intake.close)
        survey.take(ReadyRows(rows, intake, config.sampling))
    show(dry_run.report(config, source, survey, cache))
    if config.reader.max_failures is not None and survey.num_failed > config.reader.max_failures:
        complain(f"the run would fail: more than reader.max_failures={config.reader.max_failures} rows are bad")
        return EXIT_FAILED
    return EXIT_ROWS_FAILED if survey.num_failed else EXIT_COMPLETE


def fingerprint(config: GenerateConfig) -> dict[str, Any]:
    """Of the files that decide answers, as they are now; reads all of them."""
    source = resolve_model(config.model.path, config.model.revision, config.model.load_format)
    hashes = FileHashes(source, resolve_paths(input_of(config)))
    hashes.wait()
    return hashes.fingerprint()


def settled(run_directory: Path, manifest: Manifest) -> int | None:
    """The exit code of a run that has everything, its files verified; None where there is something left to do."""
    counts = verified_counts(run_directory, manifest)
    if counts is None:
        return None
    show(f"{run_directory}: complete, {counts['answered']:,} answered, {counts['failed']:,} failed; files verified")
    return EXIT_ROWS_FAILED if counts["failed"] else EXIT_COMPLETE


def _warn(run: Run, reader: RowReader) -> None:
    """Of what does not keep the run from going on, but may not be meant."""
    if (kind := remote_type(run.directory)) is not None:
        _logger.warning(
            "%s is on %s, a network file system: locks and acknowledged rows may not keep what writer.durability "
            "promises; a local directory would",
            run.directory,
            kind,
        )
    for name in reader.absent_columns():
        _logger.warning(
            "writer.keep=%s: none of the first rows has this column; in the output, rows without it have null", name
        )


def _reader(config: GenerateConfig) -> RowReader:
    return RowReader(
        input_of(config),
        limit=config.reader.limit,
        prompt=config.reader.prompt,
        system=config.reader.system,
        keep=config.writer.keep,
        chat_template_kwargs=config.reader.chat_template_kwargs,
        batch_only=config.writer.format == OPENAI_BATCH,
    )


def _batch_form(config: GenerateConfig, run: Run) -> BatchForm | None:
    if config.writer.format != OPENAI_BATCH:
        return None
    began = datetime.fromisoformat(run.manifest["attempts"][0]["started"])
    return BatchForm(config.model.path, int(began.timestamp()))


def _watchdog(config: GenerateConfig, run: Run, assembly: "Assembly") -> Watchdog:
    limit_s = config.watchdog_s
    if limit_s is None:
        limit_s = CPU_WATCHDOG_S if assembly.device == "cpu" else GPU_WATCHDOG_S
    return Watchdog(
        limit_s,
        run.directory / RUN_LOG,
        assembly.engine.describe,
        lambda reason: run.manifest.finish(FAILED, EXIT_FAILED, reason),
    )


def _end_feeds(rows: RowFeed, ready: RowFeed) -> None:
    """The process that tokenises can be ended once nobody uses it."""
    rows.close()
    ready.close(patience_s=FEED_PATIENCE_S)


def _so_far(hashes: FileHashes, reader: RowReader, loop: GenerateLoop, figures: Figures) -> dict[str, object]:
    """What the manifest says of model, input and results, at the end or where the run broke off."""
    return {
        "model": hashes.facts(),
        "input": [asdict(file) for file in reader.files],
        "counts": loop.counts(),
        "figures": figures.facts(),
    }


def _note_hashes(hashes: FileHashes, run: Run) -> None:
    if hashes.has_news:
        run.manifest.record(fingerprint=hashes.fingerprint())


def _note_end(engine: "LLMEngine", journal: Journal, run: Run) -> None:
    """Whether all of the attempt is on the disk, and the numbers that a later one must not use again.

    Which steps there were say the records, as far as they go; without any, the manifest.
    """
    facts: dict[str, Any] = {"sealed": journal.is_sealed, "last_seq_id": engine.next_seq_id - 1}
    if not run.manifest["attempts"][-1]["recorder"]:
        facts["last_step"] = engine.last_committed
    with contextlib.suppress(OSError):  # a disk that fails here has failed before; what it said last is not sealed
        run.manifest.record_attempt(**facts)


def _break_off(
    error: BaseException, journal: Journal, results: Results, run: Run, facts: Callable[[], dict[str, object]]
) -> None:
    """Seals what there is and writes it down; should that fail too, `error` is still the one that counts."""
    try:
        journal.close()
        results.failures.finish()  # what went wrong so far; the run's results stay in the logs
        run.manifest.record(**facts())
    except (JournalError, OSError) as second:
        if not isinstance(error, JournalError):
            error.add_note(f"and what was finished could not be written: {second}")


def _record_tables(config: GenerateConfig, run: Run, power: bool) -> "list[RecordTables]":
    if not config.recorder.enabled:
        return []
    return [RecordTables(run.directory / "records", attempt=run.manifest.attempt, durable=power)]


def _check_dtype(run: Run, assembly: "Assembly") -> None:
    """model.dtype=auto may mean another type on this machine, and then other answers."""
    now = assembly.facts().get("dtype")
    for attempt in run.manifest["attempts"]:
        before = attempt.get("engine", {}).get("dtype", now)
        if before != now:
            raise UsageError(
                f"resume={run.directory}: the run has answers in {before}, and model.dtype here is {now}; "
                f"resume it with device and model.dtype as they were"
            )


def _assemble(config: GenerateConfig, run: Run, figures: Figures, source: ModelSource) -> "Assembly":
    """The engine. What does not fit this machine is the user's to cure, like any other setting."""
    import torch

    from nanovllm.assembly import assemble

    if parse_config(source.config).num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        return assemble(
            to_llm_config(config),
            recorders=[figures],
            clock=run.clock.now_ns,
            source=source,
            phase=run.phase,
            first_step=run.numbers.first_step,
            first_seq_id=run.numbers.first_seq_id,
        )
    except SettingError as error:
        raise UsageError(str(error)) from error


COMMAND = Command(
    module="jobs.generate",
    config_name="generate",
    schema=GenerateConfig,
    check=check,
    run=run,
    rehearse=rehearse,
    resuming=Resuming(fingerprint=fingerprint, settled=settled, free_keys=FREE_KEYS),
)
