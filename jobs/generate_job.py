"""The generate job: answers every row of an input file and records every step."""

import os
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import EXIT_COMPLETE, EXIT_ROWS_FAILED, Command, Run
from jobs.config import OPENAI_BATCH, GenerateConfig, to_llm_config
from jobs.figures import Figures
from jobs.file_hashes import FileHashes
from jobs.generate_loop import GenerateLoop
from jobs.progress import Progress
from jobs.reader import RowReader, check_input
from jobs.ready_rows import ReadyRows, weight
from jobs.recorder import ParquetRecorder
from jobs.row_feed import RowFeed
from jobs.summary import show, summary
from jobs.usage import UsageError
from jobs.writer import FailureWriter, GenerationWriter, check_keep
from nanovllm.errors import ModelError, SettingError
from nanovllm.events import Recorder
from nanovllm.models.checkpoint import check_checkpoint
from nanovllm.models.model_config import parse_config
from nanovllm.models.source import ModelSource, resolve_model

if TYPE_CHECKING:
    from nanovllm.assembly import Assembly

SMALL_MODEL = 20_000_000
"""Weights below which one CPU thread is used: a second gains up to a half on an idle machine, but its barriers, one or
two for each small operation, cost a factor of ten once another process wants a core (2 cores, 2026-11-23: 1,399 output
tok/s against 908 when idle, 61 against 736 beside one busy process, on the embedded model)."""
FEED_PATIENCE_S = 10.0
"""For the rows that are being tokenised when a run ends early."""
BUNDLED_PROMPTS = Path(__file__).parent / "data" / "tiny_prompts.jsonl"


def input_of(config: GenerateConfig) -> str:
    return config.input or str(BUNDLED_PROMPTS)


def check(config: GenerateConfig) -> None:
    """Looks at input and model as far as that goes in milliseconds and without torch."""
    check_keep(config.writer.keep)
    check_input(input_of(config), prompt=config.reader.prompt, system=config.reader.system, keep=config.writer.keep)
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


def run(config: GenerateConfig, run: Run) -> int:
    """Load, generate, finish; returns 3 when some rows have no answer."""
    source = resolve_model(config.model.path, config.model.revision, config.model.load_format)
    reader = RowReader(
        input_of(config),
        limit=config.reader.limit,
        prompt=config.reader.prompt,
        system=config.reader.system,
        keep=config.writer.keep,
        chat_template_kwargs=config.reader.chat_template_kwargs,
        batch_only=config.writer.format == OPENAI_BATCH,
    )
    rows = RowFeed(reader, config.engine.max_num_seqs, weight=lambda row: row.weight)
    rows.wait_for_first(run.stop)  # what is no input at all shows before anything is made for it
    figures = Figures()
    with ExitStack() as stack:
        stack.callback(rows.close)
        assembly = _assemble(config, run, figures, source)
        stack.callback(assembly.intake.close)
        ready = RowFeed(ReadyRows(rows, assembly.intake, config.sampling), config.engine.max_num_seqs, weight)
        stack.callback(_end_feeds, rows, ready)
        recorder = stack.enter_context(closing(_flight_recorder(config, run)))
        assembly.engine.recorders.append(recorder)
        generations = stack.enter_context(GenerationWriter(run.directory, config.writer.format, config.writer.keep))
        failures = stack.enter_context(FailureWriter(run.directory))
        hashes = FileHashes(source)
        run.manifest.record(device=assembly.device, engine=assembly.facts())
        loop = GenerateLoop(
            assembly,
            ready,
            generations,
            failures,
            Progress(config.progress, reader.count()),
            source=", ".join(reader.paths),
            in_step=all(Path(path).is_file() for path in reader.paths),
            max_failures=config.reader.max_failures,
        )
        try:
            with run.phase("generate"), run.stop.deferred():
                loop.run(run.stop)
        except BaseException:
            run.manifest.record(**_so_far(hashes, reader, loop, figures))
            raise
        with run.phase("write"):
            outputs = [generations.finish(), failures.finish()]
        with run.phase("finish"):
            recorder.close()
            hashes.wait()
            run.manifest.record(
                **_so_far(hashes, reader, loop, figures),
                output=[{**asdict(file), "path": file.path.name} for file in outputs],
            )
    answers = BUNDLED_PROMPTS if config.input is None else None
    show(summary(run.directory, loop.counts(), figures, outputs[0].path, answers))
    return EXIT_ROWS_FAILED if loop.num_failed else EXIT_COMPLETE


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


def _flight_recorder(config: GenerateConfig, run: Run) -> Recorder:
    if not config.recorder.enabled:
        return Recorder()
    return ParquetRecorder(run.directory, flush_s=config.recorder.flush_s)


def _assemble(config: GenerateConfig, run: Run, figures: Figures, source: ModelSource) -> "Assembly":
    """The engine. What does not fit this machine is the user's to cure, like any other setting."""
    import torch

    from nanovllm.assembly import assemble

    if parse_config(source.config).num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        return assemble(
            to_llm_config(config), recorders=[figures], clock=run.clock.now_ns, source=source, phase=run.phase
        )
    except SettingError as error:
        raise UsageError(str(error)) from error


COMMAND = Command(module="jobs.generate", config_name="generate", schema=GenerateConfig, check=check, run=run)
