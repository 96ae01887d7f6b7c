"""A job that does what its `input` says, launched as `python -m tests.jobs.standin`; stands in for jobs.generate."""

import os
import signal
import sys
import time

from jobs.config import GenerateConfig
from jobs.launch import Command, Run, UsageError, launch


def check(config: GenerateConfig) -> None:
    if config.input == "missing":
        raise FileNotFoundError("input=missing: no such file")
    if __name__ == "__main__":  # elsewhere the test's own process may have it
        assert "torch" not in sys.modules, "torch was imported before the run began"


def run(config: GenerateConfig, run: Run) -> int:
    assert run.manifest["status"] == "running"
    with run.phase("load"):
        if config.input == "cannot-start":
            raise UsageError("device=cuda: this machine has no CUDA device; allowed here: auto, cpu")
    if config.input == "load":
        ready(run)
        time.sleep(30)
    if config.input == "steps":
        steps(run, polls=True)
    if config.input == "stuck":
        steps(run, polls=False)
    if config.input == "fail":
        raise ValueError(f"the model fell over {os.environ.get('HF_TOKEN', '')}")
    if config.input == "crash":
        os._exit(7)
    if config.input == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    run.manifest.record(counts={"rows": 4}, figures={"tokens_per_second": 1.5})
    return 3 if config.input == "rows-failed" else 0


def steps(run: Run, polls: bool) -> None:
    try:
        with run.stop.deferred():
            ready(run)
            for _ in range(600):
                time.sleep(0.05)
                if polls:
                    run.stop.check()
    finally:
        (run.directory / "sealed").touch()


def ready(run: Run) -> None:
    print("READY", run.directory, flush=True)


COMMAND = Command(module="tests.jobs.standin", config_name="generate", schema=GenerateConfig, check=check, run=run)

if __name__ == "__main__":
    sys.exit(launch(COMMAND))
