"""A job of many short rows over a runner that does no work: python -m tests.jobs.throughput_job ROWS DIRECTORY FORM

Prints one JSON object: rows, seconds, rows a second, and how memory grew after the first rows. FORM is prompt,
messages or ids; the tiny model's tokenizer and template make token ids of the first two.
"""

import json
import os
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from jobs.config import GenerateConfig
from jobs.figures import Figures
from jobs.generate_job import COMMAND, run
from jobs.launch import Run, launch
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.plan import Plan, StepResult
from nanovllm.engine.scheduler import Scheduler
from nanovllm.intake import Intake
from nanovllm.models.source import ModelSource
from nanovllm.sampling_params import SamplingParams
from nanovllm.text import load_tokenizer
from tests.jobs.scripted_job import ScriptedAssembly

FIRST_ROWS = 50_000
"""Memory is compared with what it was after these."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class IdleRunner:
    """Every sequence samples the token 5."""

    lookahead = 1

    def __init__(self) -> None:
        self._submitted: deque[Plan] = deque()

    def submit(self, plan: Plan) -> None:
        self._submitted.append(plan)

    def collect(self) -> StepResult:
        plan = self._submitted.popleft()
        return StepResult(token_ids=np.full(np.count_nonzero(plan.samples), 5, np.int32))


class MemoryWatch(threading.Thread):
    """Resident memory when FIRST_ROWS (or a tenth of all) were done, and the most after that."""

    def __init__(self, directory: Path, num_rows: int) -> None:
        super().__init__(daemon=True)
        self._directory = directory
        self._first = min(FIRST_ROWS, num_rows // 10)
        self.after_first = 0
        self.largest = 0
        self.series: list[tuple[int, float]] = []
        """(rows done, MB)"""

    def run(self) -> None:
        while True:
            time.sleep(0.1)
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
            rows_done = self._rows_done()
            if not self.series or rows_done >= self.series[-1][0] + self._first:
                self.series.append((rows_done, round(rss / 1e6, 1)))
            if self.after_first:
                self.largest = max(self.largest, rss)
            elif rows_done >= self._first:
                self.after_first = self.largest = rss

    def _rows_done(self) -> int:
        path = self._directory / "progress.json"
        return json.loads(path.read_text())["rows_done"] if path.exists() else 0


def assemble(config: GenerateConfig, run: Run, figures: Figures, source: ModelSource) -> ScriptedAssembly:
    tokenizer = load_tokenizer(source.directory)
    scheduler = Scheduler(
        BlockManager(16_384, 16, prefix_caching=True),
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_model_len=2048,
        eos_token_ids=(2,),
    )
    engine = LLMEngine(scheduler, IdleRunner(), recorders=[figures], clock=run.clock.now_ns)
    defaults = SamplingParams(max_tokens=4)
    return ScriptedAssembly(
        engine=engine, intake=Intake(engine, tokenizer, vocab_size=1600, defaults=defaults, seed=config.seed)
    )


def write_input(path: Path, num_rows: int, form: str) -> None:
    with path.open("w") as file:
        for row in range(num_rows):
            text = f"Row {row}: count from {row % 100} to {row % 1000} and say which words come after that."
            value = {"prompt": text, "messages": [{"role": "user", "content": text}], "ids": [row % 1000 + 5, 7, 9]}[
                form
            ]
            name = "prompt_token_ids" if form == "ids" else form
            file.write(json.dumps({"id": f"row-{row}", name: value}) + "\n")


def main(num_rows: int, directory: Path, form: str) -> int:
    path = directory / "rows.jsonl"
    write_input(path, num_rows, form)
    watch = MemoryWatch(directory / "run", num_rows)
    watch.start()
    began = time.monotonic()
    command = replace(COMMAND, run=partial(run, assemble=assemble))
    words = [f"input={path}", "model=tiny", "progress=off", "log_level=WARNING", f"hydra.run.dir={directory / 'run'}"]
    code = launch(command, [*words, *sys.argv[4:]])
    seconds = time.monotonic() - began
    facts = {
        "rows": num_rows,
        "form": form,
        "seconds": round(seconds, 1),
        "rows_per_s": round(num_rows / seconds),
        "rss_after_first_mb": round(watch.after_first / 1e6, 1),
        "series_mb": watch.series,
        "growth_mb": round((watch.largest - watch.after_first) / 1e6, 1),
    }
    print(json.dumps(facts))
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
