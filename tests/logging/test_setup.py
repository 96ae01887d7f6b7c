"""How the text log is switched on, and that no line appears twice."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nanovllm.logging import close_job_logging, configure_job_logging, parse_level
from nanovllm.logging.terminal import TerminalHandler, escape_controls

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \[nanovllm\.engine\.scheduler\] \[INFO\] hello 1")
SPEAK = """
log = logging.getLogger("nanovllm.engine.scheduler")
for level in ("debug", "info", "warning", "error"):
    getattr(log, level)("hello %d", 1)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "NANOVLLM_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "import logging, os, sys\n" + code],
        env=inherited | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def levels(output: str) -> list[str]:
    return re.findall(r"\[(DEBUG|INFO|WARNING|ERROR)\] hello 1$", output, flags=re.MULTILINE)


def test_a_program_without_logging_sees_each_line_once_in_the_default_format_from_info_on():
    done = run("import nanovllm" + SPEAK)
    assert (done.returncode, done.stdout) == (0, "")
    assert levels(done.stderr) == ["INFO", "WARNING", "ERROR"]
    assert LINE.fullmatch(done.stderr.splitlines()[0])
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("DEBUG", ["DEBUG", "INFO", "WARNING", "ERROR"]),
        ("info", ["INFO", "WARNING", "ERROR"]),
        ("Warning", ["WARNING", "ERROR"]),
        ("eRRor", ["ERROR"]),
        ("", ["INFO", "WARNING", "ERROR"]),
    ],
)
def test_the_variable_sets_the_level_in_any_case(word: str, shown: list[str]):
    assert levels(run("import nanovllm" + SPEAK, NANOVLLM_LOG_LEVEL=word).stderr) == shown


def test_the_variable_also_counts_when_python_sets_it_before_the_import():
    done = run("os.environ['NANOVLLM_LOG_LEVEL'] = 'debug'\nimport nanovllm" + SPEAK, NANOVLLM_LOG_LEVEL="ERROR")
    assert levels(done.stderr) == ["DEBUG", "INFO", "WARNING", "ERROR"]


@pytest.mark.parametrize("before", ["", "logging.basicConfig()\n"])
@pytest.mark.parametrize("word", ["LOUD", "10", "DEBUG INFO", "CRITICAL"])
def test_another_word_is_an_error_that_lists_the_four(word: str, before: str):
    done = run(before + "import nanovllm", NANOVLLM_LOG_LEVEL=word)
    assert done.returncode != 0
    assert f"ValueError: NANOVLLM_LOG_LEVEL={word}: must be one of DEBUG, INFO, WARNING, ERROR" in done.stderr


@pytest.mark.parametrize("environment", [{}, {"NANOVLLM_LOG_LEVEL": "DEBUG"}])
def test_a_program_that_configured_logging_first_keeps_format_handlers_and_level(environment: dict[str, str]):
    code = """
logging.basicConfig(level=logging.WARNING, format="MINE %(message)s", stream=sys.stdout)
before = list(logging.getLogger().handlers)
import nanovllm
assert logging.getLogger().handlers == before and logging.getLogger().level == logging.WARNING
assert not logging.getLogger("nanovllm").handlers
"""
    done = run(code + SPEAK, **environment)
    assert (done.stdout, done.stderr, done.returncode) == ("MINE hello 1\nMINE hello 1\n", "", 0)


def test_a_program_that_configures_logging_afterwards_takes_the_lines_over():
    done = run(
        "import nanovllm"
        + SPEAK
        + "logging.basicConfig(level=20, format='MINE %(message)s', stream=sys.stdout)"
        + SPEAK
    )
    assert levels(done.stderr) == ["INFO", "WARNING", "ERROR"]
    assert done.stdout == "MINE hello 1\n" * 3


def test_importing_again_adds_no_second_handler():
    done = run("import importlib, nanovllm\nimportlib.reload(nanovllm)" + SPEAK)
    assert levels(done.stderr) == ["INFO", "WARNING", "ERROR"]


def test_a_level_that_the_program_gave_to_the_package_stays_unless_the_variable_says_otherwise():
    code = "logging.getLogger('nanovllm').setLevel('ERROR')\nimport nanovllm" + SPEAK
    assert levels(run(code).stderr) == ["ERROR"]
    assert levels(run(code, NANOVLLM_LOG_LEVEL="WARNING").stderr) == ["WARNING", "ERROR"]


def test_the_package_and_its_log_import_no_torch_and_no_numpy():
    done = run("import nanovllm, nanovllm.logging\nprint({'torch', 'numpy', 'tqdm'} & sys.modules.keys())")
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_engine_config_and_text_recorder_import_no_torch():
    done = run(
        "import nanovllm.config, nanovllm.engine.scheduler, nanovllm.logging.text_recorder, jobs.recorder\n"
        "from nanovllm import SamplingParams\nprint('torch' in sys.modules)"
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import nanovllm

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        nanovllm.Nothing  # noqa: B018
    assert {"LLM", "RequestOutput", "CompletionOutput", "SamplingParams"} <= set(dir(nanovllm))


def test_a_level_word_is_read_with_its_key_in_the_complaint():
    assert parse_level("log_level", " debug ") == logging.DEBUG
    with pytest.raises(ValueError, match=r"^log_level=verbose: must be one of DEBUG, INFO, WARNING, ERROR$"):
        parse_level("log_level", "verbose")


# Jobs


class Terminal:
    """Everything that was written to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What a job shows on stderr; afterwards no job log is left open."""
    monkeypatch.delenv("NANOVLLM_LOG_LEVEL", raising=False)
    yield Terminal(capsys)
    close_job_logging()


def test_a_jobs_terminal_and_run_log_hold_the_same_lines(terminal: Terminal, tmp_path: Path):
    configure_job_logging(None, tmp_path / "run.log")
    logging.getLogger("nanovllm.engine.scheduler").info("from the engine")
    logging.getLogger("jobs.generate").info("from the job")
    logging.getLogger("jobs.generate").debug("too fine")
    logging.getLogger("another.library").info("too fine")
    logging.getLogger("another.library").warning("from a library")
    close_job_logging()
    logging.getLogger("jobs.generate").warning("after the end")
    text = (tmp_path / "run.log").read_text()
    assert [line.split("] ")[-1] for line in text.splitlines()] == ["from the engine", "from the job", "from a library"]
    assert terminal.getvalue() == text


@pytest.mark.parametrize(
    ("level", "variable", "shown"),
    [
        (None, None, ["INFO", "WARNING", "ERROR"]),
        (None, "error", ["ERROR"]),
        ("debug", "error", ["DEBUG", "INFO", "WARNING", "ERROR"]),
        ("WARNING", None, ["WARNING", "ERROR"]),
    ],
)
def test_a_jobs_level_is_its_own_then_the_variables_then_info(
    level: str | None,
    variable: str | None,
    shown: list[str],
    terminal: Terminal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if variable is not None:
        monkeypatch.setenv("NANOVLLM_LOG_LEVEL", variable)
    configure_job_logging(level, tmp_path / "run.log")
    for name in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logging.getLogger("nanovllm.engine.scheduler").log(logging.getLevelNamesMapping()[name], "hello 1")
    assert levels(terminal.getvalue()) == shown


def test_a_bad_level_of_a_job_leaves_logging_as_it_was(terminal: Terminal, tmp_path: Path):
    before = list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match="log_level=loud"):
        configure_job_logging("loud", tmp_path / "run.log")
    assert logging.getLogger().handlers == before


def test_an_error_with_its_traceback_is_in_the_run_log(terminal: Terminal, tmp_path: Path):
    configure_job_logging(None, tmp_path / "run.log")
    try:
        raise RuntimeError("the device is gone \x1b[2J")
    except RuntimeError:
        logging.getLogger("jobs.generate").exception("the job failed")
    close_job_logging()
    text = (tmp_path / "run.log").read_text()
    assert text.startswith("[")
    assert "[ERROR] the job failed\nTraceback (most recent call last):\n" in text
    assert "RuntimeError: the device is gone \\x1b[2J\n" in text
    assert text == terminal.getvalue()


def test_pythons_warnings_reach_the_run_log(terminal: Terminal, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_job_logging(None, tmp_path / "run.log")
        warnings.warn("slow path", UserWarning, stacklevel=1)
        close_job_logging()
    text = (tmp_path / "run.log").read_text()
    assert "[py.warnings] [WARNING]" in text
    assert "UserWarning: slow path" in text
    assert len(text.splitlines()) == 1


def test_a_jobs_log_goes_on_where_an_earlier_attempt_stopped(terminal: Terminal, tmp_path: Path):
    for attempt in range(2):
        configure_job_logging(None, tmp_path / "run.log")
        logging.getLogger("jobs.generate").info("attempt %d", attempt)
    close_job_logging()
    assert [line[-9:] for line in (tmp_path / "run.log").read_text().splitlines()] == ["attempt 0", "attempt 1"]


def test_each_job_of_a_sweep_has_its_own_log_and_every_line_once(terminal: Terminal, tmp_path: Path):
    for name in ("a.log", "b.log"):
        configure_job_logging(None, tmp_path / name)  # the second closes the first
        logging.getLogger("jobs.generate").info("job %s", name)
    close_job_logging()
    for name in ("a.log", "b.log"):
        assert (tmp_path / name).read_text().endswith(f"job {name}\n")
        assert len((tmp_path / name).read_text().splitlines()) == 1
    assert len(terminal.getvalue().splitlines()) == 2


def test_handlers_and_levels_of_the_program_are_set_aside_and_put_back(terminal: Terminal, tmp_path: Path):
    root, package = logging.getLogger(), logging.getLogger("nanovllm")
    before = (root.level, package.level)
    foreign = logging.StreamHandler(sys.stderr)
    root.addHandler(foreign)
    try:
        configure_job_logging("DEBUG", tmp_path / "run.log")
        logging.getLogger("nanovllm.engine.scheduler").info("once")
        assert len(terminal.getvalue().splitlines()) == 1
        close_job_logging()
        assert foreign in root.handlers
        assert (root.level, package.level) == before
        close_job_logging()  # nothing is left to close
        assert root.handlers.count(foreign) == 1
    finally:
        root.removeHandler(foreign)


def test_loggers_that_a_dict_config_switched_off_speak_again(terminal: Terminal, tmp_path: Path):
    logger = logging.getLogger("nanovllm.engine.scheduler")
    logger.disabled = True
    configure_job_logging(None, tmp_path / "run.log")
    logger.info("here")
    assert terminal.getvalue().endswith("here\n")


# The terminal


def test_text_of_users_cannot_steer_the_terminal_or_forge_a_line(terminal: Terminal, tmp_path: Path):
    configure_job_logging(None, tmp_path / "run.log")
    logging.getLogger("jobs.generate").info("%s", "a\x1b[31mb\rc\nd\x9b2Je\u202ef\ud800g\th é 漢")
    expected = "a\\x1b[31mb\\rc\\nd\\x9b2Je\\u202ef\\ud800g\th é 漢\n"
    assert terminal.getvalue().endswith(expected)
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == terminal.getvalue()


def test_printable_text_and_line_structure_stay():
    assert escape_controls("é 漢 🙂 ~") == "é 漢 🙂 ~"
    assert escape_controls("one\ttwo\nthree") == "one\ttwo\nthree"
    assert escape_controls("\x00\x07\x7f\u2028") == "\\x00\\x07\\x7f\\u2028"


def test_a_line_does_not_tear_a_progress_bar(terminal: Terminal):
    from tqdm import tqdm

    handler = TerminalHandler()
    with tqdm(total=10, ascii=True, mininterval=0) as bar:
        bar.update(3)
        handler.emit(logging.LogRecord("jobs.generate", logging.INFO, "", 0, "between", None, None))
        bar.update(3)
    pieces = re.split(r"[\r\n]", terminal.getvalue())
    assert any(re.fullmatch(r"\[.*\] \[jobs\.generate\] \[INFO\] between", piece) for piece in pieces)


def test_a_program_without_standard_error_loses_no_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", None)
    TerminalHandler().emit(logging.LogRecord("jobs.generate", logging.INFO, "", 0, "nowhere", None, None))
