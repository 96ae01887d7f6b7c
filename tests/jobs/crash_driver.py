"""Runs the scripted job in forked children that die, fail or go on, and checks what they leave.

python -m tests.jobs.crash_driver WHAT [key=value ...]      one JSON line with the figures; see the functions below

A process of its own without torch: forking is then cheap, and no other thread is there to be forked away.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jobs.journal
import jobs.record_parts
from jobs import disk
from jobs.launch import launch
from jobs.results import Results
from jobs.row_log import unsealed_line
from jobs.writer import FailureWriter, GenerationWriter
from tests.jobs.crash_check import Acks, Broken, check_after_crash, check_complete, ensure
from tests.jobs.disk_faults import BEFORE, MODES, CountingOs, FailingOs, KillingOs
from tests.jobs.durability_mutants import BY_NAME, SYNCS, TAILS
from tests.jobs.power_loss import POLICIES, Ack, RecordingOs, acks_of, build
from tests.jobs.scripted_job import SCRIPTED, without_attempt, words, write_input

NUM_ROWS = 18
FIRST_CALLS = {"manifest_in_place": 1, "last_row_forgotten": 1, "final_file_in_place": 1}
"""Where a broken variant shows early; the others need rows in the logs, which come later."""
COMPLETE = 3
"""Some rows of the input are bad."""


class Case:
    """One run directory, its acknowledgements, and what it must come to."""

    def __init__(self, root: Path, name: str, mutate: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self.directory = root / name
        self.acks: Acks = {}
        self.codes: list[int] = []
        self._mutate = mutate

    def attempt(self, faults: CountingOs | None = None, kill_after_s: float | None = None) -> int:
        """A child's exit code, -9 where it was killed. Starts the run, or goes on with it."""
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            os._exit(self._child(write_end, faults))
        os.close(write_end)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(read_end, "rb") as acknowledged:
            lines = acknowledged.read().splitlines()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self._note(lines)
        self.codes.append(code)
        return code

    def check(self, reference: dict[str, bytes]) -> None:
        check_after_crash(self.directory, self.acks, reference)

    def finish(self, reference: dict[str, bytes]) -> None:
        """Goes on until the end; again when everything was done; and nothing changes then."""
        ensure(self.attempt() == COMPLETE, f"resuming ended with {self.codes[-1]} after {self.codes[:-1]}")
        check_complete(self.directory, self.acks, reference)
        before = _contents(self.directory)
        num_acks = len(self.acks)
        ensure(self.attempt() == COMPLETE, f"resuming a complete run ended with {self.codes[-1]}")
        ensure(_contents(self.directory) == before, "resuming a complete run changed it")
        ensure(len(self.acks) == num_acks, "a complete run acknowledged rows")

    def _note(self, lines: list[bytes]) -> None:
        for line in lines:
            ack = json.loads(line)
            key = (ack["log"], ack["row"])
            ensure(key not in self.acks, f"acknowledged twice: {key}")
            self.acks[key] = ack["line"].encode()

    def _child(self, write_end: int, faults: CountingOs | None) -> int:
        null = os.open(os.devnull, os.O_RDWR)
        if "CRASH_DRIVER_SHOW" not in os.environ:
            os.dup2(null, 1)
            os.dup2(null, 2)
        faults = CountingOs() if faults is None else faults
        disk.os = faults  # type: ignore[assignment]
        jobs.journal.MAX_UNWRITTEN_BYTES = 1500  # several groups in a job of milliseconds
        jobs.journal.WAKE_AT = 1
        _tell(write_end, "generations", GenerationWriter)
        _tell(write_end, "failures", FailureWriter)
        self._mutate()
        if (self.directory / "manifest.json").exists():
            code = launch(SCRIPTED, [f"resume={self.directory}", "reader.max_failures=null"])
        else:
            code = launch(SCRIPTED, [*words(self.root / "rows.jsonl"), f"hydra.run.dir={self.directory}"])
        if not isinstance(faults, KillingOs | FailingOs):
            (self.root / "num_calls").write_text(str(faults.num_calls))
        return code


def _tell(write_end: int, name: str, writer: Any) -> None:
    """Has the writer tell of each line that it has acknowledged."""
    flush = writer.flush

    def flush_and_tell(self: Any) -> None:
        lines = list(self.log._waiting)
        flush(self)
        for line in lines:
            text = (unsealed_line(line) or b"").decode()
            told = {"log": name, "row": json.loads(text)["row"], "line": text + "\n"}
            os.write(write_end, json.dumps(told).encode() + b"\n")

    writer.flush = flush_and_tell


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@contextmanager
def cases(
    mutate: Callable[[], None] = lambda: None, num_rows: int = NUM_ROWS
) -> "Iterator[tuple[Callable[[], Case], dict[str, bytes], int]]":
    """Makes cases below one directory; the reference of an undisturbed run, and how many calls that made."""
    shared_memory = Path("/dev/shm")  # syncs are not what kills test, and a file there is as durable as a page
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as directory:
        root = Path(directory)
        write_input(root / "rows.jsonl", num_rows)
        plain = Case(root, "plain")
        ensure(plain.attempt() == COMPLETE, f"an undisturbed run ended with {plain.codes}")
        num_calls = int((root / "num_calls").read_text())
        names = ("generations.jsonl", "failures.jsonl")
        reference = {name: without_attempt((plain.directory / name).read_bytes()) for name in names}
        plain.finish(reference)
        number = 0

        def new_case() -> Case:
            nonlocal number
            number += 1
            shutil.rmtree(root / f"case-{number - 1}", ignore_errors=True)
            return Case(root, f"case-{number}", mutate)

        yield new_case, reference, num_calls


def every_call(stride: int = 1, first: int = 1, mutate: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """A kill before, within and after each call that changes the disk; half of the cases with a second one behind it.

    The second comes within the first calls of the next attempt, which recovers. `stride`: only every so many-th
    case; `first`: from this call on.
    """
    figures: Counter[str] = Counter()
    rng = random.Random(0)
    with cases(mutate) as (new_case, reference, num_calls):
        figures["calls"] = num_calls
        plans = [(number, mode) for number in range(first, num_calls + 1) for mode in MODES]
        for index, (number, mode) in enumerate(plans):
            second = (rng.randint(1, 40), rng.choice(MODES)) if index % 2 else None
            if index % stride:
                continue
            case = new_case()
            with _named(f"call {number} {mode}, then {second}"):
                for at in (number, mode), second:
                    if at is not None:
                        figures["kills"] += case.attempt(KillingOs(*at)) == -signal.SIGKILL
                        case.check(reference)
                figures["acks_before_the_last_attempt"] += len(case.acks)
                case.finish(reference)
            figures["cases"] += 1
    return dict(figures)


def random_kills(num_kills: int = 20, seed: int = 0) -> dict[str, Any]:
    """SIGKILL from outside at random instants, as often as it takes until a run is through, run after run."""
    figures: Counter[str] = Counter()
    rng = random.Random(seed)
    with cases(num_rows=400) as (new_case, reference, _):
        began = time.monotonic()
        new_case().attempt()
        whole_s = time.monotonic() - began
        while figures["kills"] < num_kills:
            case, num_acks = new_case(), 0
            with _named(f"run {figures['runs']}, kill {figures['kills']}"):
                while figures["kills"] < num_kills:
                    code = case.attempt(kill_after_s=rng.uniform(0.05, 1.0) * whole_s)
                    if code == COMPLETE:
                        break
                    ensure(code == -signal.SIGKILL, f"a killed attempt ended with {code}")
                    figures["kills"] += 1
                    figures["kills_after_an_acknowledgement"] += len(case.acks) > num_acks
                    num_acks = len(case.acks)
                    case.check(reference)
                case.finish(reference)
            figures["runs"] += 1
            figures["acks"] += len(case.acks)
    return dict(figures)


def failing_disk(stride: int = 1) -> dict[str, Any]:
    """ENOSPC and EIO from the n-th call on: never a success, nothing acknowledged then, resumed to the same end.

    In every third case the disk fails while a run is resumed that was killed in its middle.
    """
    figures: Counter[str] = Counter()
    with cases() as (new_case, reference, num_calls):
        figures["calls"] = num_calls
        for number in range(1, num_calls + 1, stride):
            for code in (errno.ENOSPC, errno.EIO):
                case = new_case()
                with _named(f"{errno.errorcode[code]} from call {number} on"):
                    faults = FailingOs(number, code, case.root / "failed")
                    (case.root / "failed").unlink(missing_ok=True)
                    if figures["cases"] % 3 == 2:
                        case.attempt(KillingOs(num_calls * 3 // 5, BEFORE))
                        figures["in a resumed run"] += 1
                    ended = case.attempt(faults)
                    if not (case.root / "failed").exists():  # this time the run made fewer calls
                        ensure(ended == COMPLETE, f"an undisturbed run ended with {ended}")
                        figures["undisturbed"] += 1
                        continue
                    figures[f"exit {ended}"] += 1
                    done = (case.directory / "generations.jsonl").exists() and not list(
                        case.directory.glob("*.partial.jsonl")
                    )
                    ensure(ended in (1, 2), f"ended with {ended}")
                    figures["failed after everything was written"] += done
                    figures["acks"] += len(case.acks)
                    check_after_crash(case.directory, case.acks, {"generations.jsonl": reference["generations.jsonl"]})
                    case.finish(reference)
                figures["cases"] += 1
    return dict(figures)


def torn_tails(stride: int = 1, mutate: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The last lines of both logs cut at every byte, and followed by garbage: acknowledged lines before stay."""
    figures: Counter[str] = Counter()
    with cases(mutate) as (new_case, reference, num_calls):
        whole = _stopped_late(new_case, num_calls, reference)
        for name in ("generations", "failures"):
            log = whole.directory / f"{name}.partial.jsonl"
            data = log.read_bytes()
            lines = data.splitlines(keepends=True)
            ensure(len(lines) >= 2, f"{log.name} has {len(lines)} lines")
            kept = len(data) - sum(map(len, lines[-2:]))
            for cut in range(kept, len(data) + 1, stride):
                for garbage in (b"", b"\0" * 50, b'{"row":1', lines[0][:-9] + b'x"}\n'):
                    case = new_case()
                    shutil.copytree(whole.directory, case.directory)
                    torn = data[:cut] + garbage
                    (case.directory / log.name).write_bytes(torn)
                    forgotten = [json.loads(line)["row"] for line in lines[-2:]]
                    case.acks = {k: v for k, v in whole.acks.items() if k[0] != name or k[1] not in forgotten}
                    _forget_counts(case.directory)
                    with _named(f"{log.name} cut at {cut}, then {garbage[:10]!r}"):
                        case.finish(reference)
                    figures["cases"] += 1
    return dict(figures)


def _stopped_late(new_case: Callable[[], Case], num_calls: int, reference: dict[str, bytes]) -> Case:
    """A run that was killed with several rows in both logs."""
    for number in range(num_calls * 3 // 4, num_calls):
        case = new_case()
        case.attempt(KillingOs(number, BEFORE))
        logs = [case.directory / f"{name}.partial.jsonl" for name in ("generations", "failures")]
        if all(log.exists() and log.read_bytes().count(b"\n") >= 2 for log in logs):
            case.check(reference)
            kept = Case(case.root, "late")
            shutil.copytree(case.directory, kept.directory)
            kept.acks = dict(case.acks)
            return kept
    raise Broken("no kill left rows in both logs")


def _forget_counts(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    manifest.pop("counts", None)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def power_loss(states: int = 600, seed: int = 0, mutate: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """States that a loss of power may leave, of a run that broke off and was resumed: each is recovered, some resumed.

    Recovery is Results, twice: the second must find what the first has left.
    """
    figures: Counter[str] = Counter()
    rng = random.Random(seed)
    with cases() as (new_case, reference, num_calls):
        trace, directory = _recorded(new_case(), num_calls, mutate)
        figures["operations"] = len(trace)
        for number in range(states):
            end = 1 + number * len(trace) // states if states >= len(trace) else rng.randint(1, len(trace))
            policy = POLICIES[number % len(POLICIES)]
            case = new_case()
            with _named(f"state {number}: {policy} of what was not synced after {end} operations"):
                _power_lost(case, trace[:end], policy, rng, directory, reference)
                figures["acks"] += len(case.acks)
                if number % 60 == 0:
                    case.finish(reference)
                    figures["resumed"] += 1
            figures["states"] += 1
    return dict(figures)


def _recorded(case: Case, num_calls: int, mutate: Callable[[], None]) -> tuple[list[Any], Path]:
    """What a run does to the disk that breaks off in its middle and is resumed, and where; in this very process."""
    faults = RecordingOs()
    disk.os = faults  # type: ignore[assignment]
    before = (GenerationWriter.flush, FailureWriter.flush, jobs.journal.MAX_UNWRITTEN_BYTES, jobs.journal.WAKE_AT)
    jobs.journal.MAX_UNWRITTEN_BYTES, jobs.journal.WAKE_AT = 1500, 1
    for name, writer in ("generations", GenerationWriter), ("failures", FailureWriter):
        _trace_acks(faults.trace, name, writer)
    unmutated = {module: dict(vars(module)) for module in (disk,)}
    mutate()
    try:
        with _silence():
            given = [*words(case.root / "rows.jsonl"), "reader.max_failures=1", f"hydra.run.dir={case.directory}"]
            codes = launch(SCRIPTED, given), launch(SCRIPTED, [f"resume={case.directory}", "reader.max_failures=null"])
            ensure(codes == (1, COMPLETE), f"the attempts ended with {codes}")
    finally:
        for module, names in unmutated.items():
            vars(module).update(names)
        disk.os = os
        GenerationWriter.flush, FailureWriter.flush = before[:2]
        jobs.journal.MAX_UNWRITTEN_BYTES, jobs.journal.WAKE_AT = before[2:]
    return faults.trace, case.directory


def _trace_acks(trace: list[Any], name: str, writer: Any) -> None:
    flush = writer.flush

    def flush_and_note(self: Any) -> None:
        lines = list(self.log._waiting)
        flush(self)
        texts = [unsealed_line(line) or b"" for line in lines]
        trace.extend(Ack(name, json.loads(text)["row"], text + b"\n") for text in texts)

    writer.flush = flush_and_note


def _power_lost(
    case: Case, trace: list[Any], policy: str, rng: random.Random, ran_in: Path, reference: dict[str, bytes]
) -> None:
    build(trace, policy, rng, lambda path: case.directory / Path(path).relative_to(ran_in))
    case.acks = acks_of(trace)
    ensure(not case.acks or (case.directory / "manifest.json").exists(), "rows were acknowledged and the run is gone")
    reference = {"generations.jsonl": reference["generations.jsonl"]}  # the other is there when a run breaks off, too
    case.check(reference)
    if (case.directory / "manifest.json").exists() and not (case.directory / "generations.jsonl").exists():
        for _ in range(2):
            with Results(case.directory, resumed=True) as results:
                found = results.facts()
            case.check(reference)
        ensure(found["cut_bytes"] == 0, "a second recovery found something to cut off")


@contextmanager
def _silence() -> Iterator[None]:
    kept = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, null):
            os.close(descriptor)


def mutant(name: str) -> dict[str, Any]:
    """What catches a broken variant; null where nothing does."""
    broken_by = BY_NAME[name]
    suite, settings = every_call, {"stride": 2, "first": FIRST_CALLS.get(name, 70)}
    if broken_by in SYNCS:
        suite, settings = power_loss, {"states": 600}
    elif broken_by in TAILS:
        suite, settings = torn_tails, {"stride": 61}
    try:
        suite(mutate=broken_by, **settings)
    except Broken as broken:
        return {"caught": str(broken)}
    return {"caught": None}


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Broken(f"{what}: {type(error).__name__}: {error}") from error


def main() -> None:
    name, *arguments = sys.argv[1:]
    pairs = [argument.split("=") for argument in arguments]
    settings: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in pairs}
    known: dict[str, Callable[..., dict[str, Any]]] = {
        "every_call": every_call,
        "random_kills": random_kills,
        "failing_disk": failing_disk,
        "torn_tails": torn_tails,
        "power_loss": power_loss,
        "mutant": mutant,
    }
    began = time.monotonic()
    figures = known[name](**settings)
    print(json.dumps(figures | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
