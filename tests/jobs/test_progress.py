import io
import json
import logging
import re
import threading
from pathlib import Path

import pytest

from jobs.progress import Pace, Progress
from jobs.progress_file import ProgressFile


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after it got all this."""
    return [line.split("\r")[-1].rstrip() if line.strip("\r ") else "" for line in written.split("\n")]


def test_without_a_terminal_there_is_a_line_every_30_s_and_a_last_one() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("auto", 1000, stream=stream, clock=clock)
    for second in range(1, 62):
        clock.now_s = 100.0 + second
        progress.update(second * 2, second * 50, second // 40, second, lambda pace: 1000 / pace.rows_per_s)
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == [
        "progress: 60/1000 rows, 50 output tok/s, about 08:20 left",
        "progress: 120/1000 rows, 50 output tok/s, about 08:20 left, 1 failed",
        "progress: 122/1000 rows, 3050 output tokens in 01:01, 1 failed",
    ]


def test_rates_are_those_of_the_latest_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("auto", None, stream=stream, clock=clock)
    for second in range(1, 151):
        clock.now_s = 100.0 + second
        progress.update(second, min(second, 90) * 1000, 0)
    rates = re.findall(r"progress: (\d+) rows, (\d+) output tok/s\n", stream.getvalue())
    assert [rate for _, rate in rates] == ["1000", "1000", "1000", "0", "0"]


def test_a_terminal_shows_a_bar_with_everything() -> None:
    stream = Terminal()
    progress = Progress("auto", 200, stream=stream)
    progress.update(50, 1000, 0)
    progress.update(200, 4000, 3)
    progress.close()
    last = screen(stream.getvalue())[0]
    assert re.fullmatch(r"100%\|.+\| 200/200 rows \[00:00, \d+ output tok/s, 3 failed\]", last)


def test_a_bar_without_a_total_counts_rows() -> None:
    stream = Terminal()
    progress = Progress("auto", None, stream=stream)
    progress.update(7, 100, 0)
    progress.close()
    assert re.fullmatch(r"7 rows \[00:00, \d+ output tok/s\]", screen(stream.getvalue())[0])


def test_on_draws_the_bar_wherever_it_goes_and_off_writes_nothing() -> None:
    stream = io.StringIO()
    progress = Progress("on", 10, stream=stream)
    progress.close()
    assert "0/10 rows" in stream.getvalue()
    stream = Terminal()
    progress = Progress("off", 10, stream=stream)
    progress.update(1, 1, 0)
    progress.log_stream.write("a line\n")
    progress.close()
    assert stream.getvalue() == "a line\n"
    with pytest.raises(ValueError, match="progress=loud: must be one of auto, on, off"):
        Progress("loud")


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_the_file_is_whole_and_new_once_a_second_whatever_the_mode(mode: str, tmp_path: Path) -> None:
    clock = Clock()
    progress = Progress(mode, 100, rows_before=40, file=ProgressFile(tmp_path), stream=io.StringIO(), clock=clock)
    path, asked, versions = tmp_path / "progress.json", [], set()
    for tenth in range(1, 52):
        clock.now_s = 100.0 + tenth / 10
        progress.update(40 + tenth, tenth * 30, 2, tenth, lambda pace: asked.append(pace) or 7.25)
        versions.add(path.read_text() if path.exists() else None)
    assert len(versions) == 1 + 5, "none in the first second, then one a second"
    assert len(asked) == 5
    assert asked[-1] == Pace(pytest.approx(10), pytest.approx(300), pytest.approx(10))
    state = json.loads(path.read_text())
    del state["updated"]
    assert state == {
        "status": "running",
        "rows_total": 100,
        "rows_done": 90,
        "rows_failed": 2,
        "output_tokens": 1500,
        "steps": 50,
        "rows_per_s": 10.0,
        "output_tokens_per_s": 300.0,
        "elapsed_s": 5.0,
        "seconds_left": 7.2,
    }
    progress.update(100, 1800, 2, 60)
    progress.close()
    last = json.loads(path.read_text())
    assert (last["status"], last["rows_done"], last["seconds_left"]) == ("ended", 100, 0.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["progress.json"]


def test_a_disk_that_refuses_the_file_ends_the_file_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = Progress("off", 10, file=ProgressFile(tmp_path / "nowhere"), clock=clock)
    for second in range(5):
        clock.now_s += 2
        progress.update(second, second, 0)
    progress.close()
    (record,) = caplog.records
    assert "progress.json is not written any more" in record.getMessage()


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_log_lines_stay_whole_beside_the_bar(mode: str) -> None:
    stream = Terminal()
    progress = Progress(mode, 100, stream=stream)
    handler = logging.StreamHandler(progress.log_stream)
    for number in range(20):
        handler.emit(logging.makeLogRecord({"msg": f"line {number}"}))
        progress.update(number, number * 10, 0)
    progress.close()
    handler.emit(logging.makeLogRecord({"msg": "after the end"}))
    shown = screen(stream.getvalue())
    assert [line for line in shown if line.startswith("line")] == [f"line {number}" for number in range(20)]
    assert shown[-2:] == ["after the end", ""]
    assert len(shown) == 20 + 2 + (mode != "off")


def test_log_lines_may_come_from_other_threads() -> None:
    stream = Terminal()
    progress = Progress("on", 1000, stream=stream)

    def log(name: str) -> None:
        for number in range(100):
            progress.log_stream.write(f"{name} {number}\n")

    threads = [threading.Thread(target=log, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for number in range(1000):
        progress.update(number, number, 0)
    for thread in threads:
        thread.join()
    progress.close()
    shown = screen(stream.getvalue())
    assert sorted(line for line in shown if line[:2] in ("a ", "b ")) == sorted(
        f"{n} {i}" for n in "ab" for i in range(100)
    )


class Gone(Terminal):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal
        self.gone = False

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_goes_away_ends_the_display_not_the_job(terminal: bool) -> None:
    stream, clock = Gone(terminal), Clock()
    progress = Progress("auto", 10, stream=stream, clock=clock)
    stream.gone = True
    for row in range(10):
        clock.now_s += 31
        progress.update(row, row, 0)
    progress.close()


def test_without_standard_error_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    progress = Progress("on", 10)
    progress.update(1, 1, 0)
    progress.log_stream.write("lost\n")
    progress.log_stream.flush()
    progress.close()
