"""What sql=, jobs.explain and jobs.diff answer, against the rows of the tables themselves."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.analysis.program import main
from jobs.analysis.recorded_run import RecordedRun
from jobs.analysis.views import connect
from tests.analysis.editing import Row, copied, edit, edit_answers, edit_manifest, rows_of
from tests.analysis.made_run import Shape, make_run


def said(capsys: pytest.CaptureFixture[str], module: str, *words: str, code: int = 0) -> str:
    assert main(module, words) == code
    return capsys.readouterr().out


# SQL


def test_the_views_are_the_tables(run: Path, resumed_run: Path) -> None:
    with connect([RecordedRun(run), RecordedRun(resumed_run)]) as connection:
        for table in ("steps", "block_events", "requests"):
            counts = dict(connection.execute(f"select run, count(*) from {table} group by 1").fetchall())
            assert counts == {path.name: len(rows_of(path, table)) for path in (run, resumed_run)}
        tokens = connection.execute(
            "select sum(len(token_ids)), sum(r.num_output_tokens) from generations g join requests r "
            "using (run, row, sample) where run = 'run'"
        ).fetchone()
        assert tokens is not None
        assert tokens[0] == tokens[1] == sum(request["num_output_tokens"] for request in rows_of(run, "requests"))
        rows = connection.execute('select run, "kv.block_size", preemptions, wall_s from runs order by run').fetchall()
    assert [(name, size) for name, size, *_ in rows] == [("resumed", 4), ("run", 4)]
    assert all(wall_s > 0.5 for *_, wall_s in rows)


def test_generations_with_ids_of_two_kinds_and_kept_columns_are_one_view(run: Path, tmp_path: Path) -> None:
    first, second = copied(run, tmp_path / "first"), copied(run, tmp_path / "second")
    edit_answers(first, lambda rows: [row.update(id=row["row"] if row["row"] % 2 else "even") for row in rows])
    edit_answers(second, lambda rows: [row.update(id=row["row"], topic="x'); drop") for row in rows])
    with connect([RecordedRun(first), RecordedRun(second)]) as connection:
        found = connection.execute("select run, id, topic from generations where row = 3 order by run").fetchall()
    assert found == [("first", "3", None), ("second", "3", "x'); drop")]


def test_a_run_without_answers_has_an_empty_view(run: Path, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "run")
    (other / "generations.jsonl").unlink()
    with connect([RecordedRun(other)]) as connection:
        assert connection.execute("select count(*), max(text) from generations").fetchone() == (0, None)


def test_only_what_a_query_names_is_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copied(run, tmp_path / "run")
    for part in (other / "records" / "block_events").glob("*.parquet"):
        part.write_bytes(b"no parquet")
    assert "321" in said(capsys, "analyze", f"run={other}", "sql=select count(*) from STEPS")
    assert main("analyze", [f"run={other}", "sql=select count(*) from block_events"]) == 2
    assert "cannot be read as Parquet" in capsys.readouterr().err
    tables = said(capsys, "analyze", f"run={run}", "sql=show tables")
    assert all(name in tables for name in ("steps", "block_events", "requests", "generations", "runs"))


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("select nothing from steps", "Binder Error"),
        ("select step\n  frum frum steps", "(line 2, at 'frum steps')"),
        ("select 'open", 'at "\'open")'),
        ("select 1; select 2", "sql=select 1; select 2: has 2 statements, must be one"),
        (" ; ", "has 0 statements, must be one"),
        ("select kv.block_size from runs", 'the name of such a column stands in double quotes: "kv.block_size"'),
        ("select steps2.step from runs", "Binder Error"),
    ],
)
def test_a_mistake_in_a_query_is_one_line(sql: str, says: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("analyze", [f"run={run}", f"sql={sql}"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert says in line
    assert captured.out == ""


def test_long_lists_leave_the_other_columns_in_sight(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing of them is lost."""
    other = copied(run, tmp_path / "run")
    edit_answers(other, lambda rows: rows[0].update(token_ids=list(range(10_000, 11_000))))
    beside = said(capsys, "analyze", f"run={other}", "sql=select row, token_ids from generations where row = 0")
    assert max(len(line) for line in beside.splitlines()) < 300
    alone = said(capsys, "analyze", f"run={other}", "sql=select token_ids from generations where row = 0")
    for answer in (beside, alone):
        assert all(str(token) in answer for token in range(10_000, 11_000))
    whole = said(capsys, "analyze", f"run={other}", "sql=select * from steps limit 1")
    assert "comm_bytes" in whole, "the last of many columns"


def test_a_statement_may_end_in_a_semicolon_and_hold_some(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a; b" in said(capsys, "analyze", f"run={run}", "sql=select 'a; b' as x from runs;")
    assert "321" in said(capsys, "analyze", f"run={run}", "sql=pivot steps on replica using count(*)")


@pytest.mark.parametrize(
    "sql",
    [
        "copy (select * from steps) to '{0}/stolen.csv'",
        "export database '{0}/stolen'",
        "attach '{0}/stolen.db'",
        "select * from read_csv('{0}/secret.csv')",
        "select * from '{0}/secret.csv'",
        "select * from glob('{0}/*')",
        "select content from read_text('{0}/secret.csv')",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "reset lock_configuration",
        "set temp_directory = '{0}/spilled'",
        "select * from connection",
    ],
)
def test_a_query_reaches_nothing_but_the_run(
    sql: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.csv").write_text("known,to\nnobody,else\n")
    assert main("analyze", [f"run={run}", f"sql={sql.format(tmp_path)}"]) == 2
    captured = capsys.readouterr()
    assert "nobody" not in captured.out + captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


# Explain


def test_the_life_of_a_row_names_queue_hits_chunks_preemption_and_end(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = rows_of(run, "requests")
    chosen = next(r for r in requests if r["num_preemptions"] and r["num_cached_tokens"])
    text = said(capsys, "explain", f"run={run}", f"row={chosen['row']}")

    steps = [step for step in rows_of(run, "steps") if chosen["seq_id"] in step["seq_ids"]]
    preempted = [s["step"] for s in rows_of(run, "steps") if chosen["seq_id"] in s["preempted_seq_ids"]]
    waited = (chosen["first_scheduled_ns"] - chosen["arrived_ns"]) / 1e6
    assert f"step {steps[0]['step']}: scheduled after {waited:.1f} ms in the queue" in text
    assert f"{chosen['num_cached_tokens']} tokens from the prefix cache" in text
    assert [int(step) for step in re.findall(r"step (\d+): preempted", text)] == preempted
    assert f"ended: {chosen['finish_reason']}" in text
    decodes = [tuple(map(int, found)) for found in re.findall(r"steps (\d+) to (\d+): (\d+) decode", text)]
    chunks = [int(step) for step in re.findall(r"step (\d+): chunk", text)]
    assert len(chunks) + sum(count for *_, count in decodes) == len(steps), "every step of the row is told"
    assert {first for first, *_ in decodes} <= {step["step"] for step in steps}


def test_the_life_of_a_row_counts_its_steps_in_halves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, told = rows_of(run, "steps"), 0
    for request in rows_of(run, "requests")[::7]:
        text = said(capsys, "explain", f"run={run}", f"row={request['row']}")
        found = re.findall(r"(\d+) of them in halves", text)
        told += len(found)
        mine = [step for step in steps if request["seq_id"] in step["seq_ids"]]
        assert sum(map(int, found)) == sum(step["in_halves"] for step in mine)
    assert told > 3


def test_hits_are_told_from_the_row_that_published_the_block(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second way: the publisher of each block, followed event by event."""
    row_of = {request["seq_id"]: request["row"] for request in rows_of(run, "requests")}
    publisher: dict[int, int] = {}
    hits: dict[int, list[tuple[int, int]]] = {}
    for event in rows_of(run, "block_events"):
        if event["event"] == "commit":
            publisher[event["block_id"]] = event["seq_id"]
        if event["event"] == "hit":
            hits.setdefault(event["seq_id"], []).append((event["block_id"], row_of[publisher[event["block_id"]]]))
    checked: Counter[str] = Counter()
    for seq_id, expected in list(hits.items())[:12]:
        text = said(capsys, "explain", f"run={run}", f"row={row_of[seq_id]}")
        told: list[tuple[int, int]] = []
        for line in re.findall(r"from the prefix cache: (.*)", text):
            for blocks, row in re.findall(r"blocks? ([\d, ]+) from (row \d+|itself)", line):
                other = row_of[seq_id] if row == "itself" else int(row.split()[1])
                told += [(int(block), other) for block in blocks.split(",")]
        assert sorted(told) == sorted(expected), text
        checked["rows"] += 1
    assert checked["rows"] == 12


def test_who_evicted_a_prefix_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few blocks, many prefixes: what a row has in common with an earlier one is gone when it comes."""
    run = make_run(tmp_path / "run", Shape(num_blocks=24, num_prefixes=12, max_num_seqs=3))
    evictions = {
        (event["block_id"], event["step"]) for event in rows_of(run, "block_events") if event["event"] == "evict"
    }
    told = 0
    for request in rows_of(run, "requests"):
        text = said(capsys, "explain", f"run={run}", f"row={request['row']}")
        for step, blocks in re.findall(
            r"evicted before, for (?:row \d+|itself) in step (\d+): blocks? ([\d, ]+)$", text, re.M
        ):
            assert {(int(block), int(step)) for block in blocks.split(",")} <= evictions
            told += 1
    assert told > 5


def test_a_row_of_several_attempts_is_told_attempt_by_attempt(
    resumed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = copied(resumed_run, tmp_path / "run")
    requests = rows_of(both, "requests")
    row = next(request["row"] for request in requests if request["attempt"] == 2)
    edit(both, "requests", lambda rows: next(r for r in rows if r["attempt"] == 0).update(row=row))
    text = said(capsys, "explain", f"run={both}", f"row={row}")
    assert re.findall(r"of attempt (\d)", text) == ["0", "2"]


def test_a_row_that_failed_says_why_and_one_that_is_not_there_is_an_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(run, tmp_path / "run")
    (other / "failures.jsonl").write_text(
        '{"file":"rows.jsonl","line":8,"row":77,"id":null,"code":"not_json","reason":"no value"}\n'
    )
    assert "row 77 failed: not_json: no value (rows.jsonl, line 8)" in said(capsys, "explain", f"run={other}", "row=77")
    assert main("explain", [f"run={other}", "row=78"]) == 2
    assert "60 rows, 0 to 59" in capsys.readouterr().err
    assert main("explain", [f"run={other}", "row=-1"]) == 2
    assert "row=-1: must be a whole number" in capsys.readouterr().err


NOTE = "attempt 1 ran with recorder=off: rows, steps and tokens of it are not in the records"


def test_every_question_says_which_attempt_was_not_recorded(
    unrecorded_run: Path, resumed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(unrecorded_run, tmp_path / "run")
    for words in (["analyze", f"run={run}"], ["trace", f"run={run}"], ["audit", f"run={run}"]):
        assert said(capsys, *words).count(NOTE) == 1, words
    assert NOTE in (run / "report.html").read_text()
    assert main("explain", [f"run={run}", "row=60"]) == 2
    assert NOTE in capsys.readouterr().err
    assert NOTE in said(capsys, "diff", f"a={run}", f"b={run}")
    assert main("diff", [f"a={run}", f"b={resumed_run}"]) == 1
    assert "schedule: attempt 1, is recorded in b alone" in capsys.readouterr().out
    for words in (["analyze", f"run={copied(resumed_run, tmp_path / 'other')}"], ["audit", f"run={resumed_run}"]):
        text = said(capsys, *words)
        assert "recorder=off" not in text
        assert "unrecorded" not in text


# Diff


def test_a_run_does_not_differ_from_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "diff", f"a={run}", f"b={run}")
    assert "the configurations are the same" in text
    assert "the same in all 321 steps; so are all block events" in text
    assert "60 of 60 rows have the same tokens" in text


def test_two_schedules_part_at_a_step(run: Path, plain_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(
        a["step"]
        for a, b in zip(rows_of(run, "steps"), rows_of(plain_run, "steps"), strict=False)
        if any(a[name] != b[name] for name in ("seq_ids", "seq_num_tokens", "seq_context_lens", "seq_sampled"))
    )
    assert f"schedule: differs from step {first}:" in said(capsys, "diff", f"a={run}", f"b={plain_run}", code=1)


def test_configuration_tokens_and_block_events_that_differ_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(run, tmp_path / "run")

    def raise_limit(manifest: Row) -> None:
        manifest["config"]["engine"]["max_num_seqs"] = 9

    edit_manifest(other, raise_limit)
    edit_answers(other, lambda rows: rows[7]["token_ids"].__setitem__(2, 5555))
    edit_answers(other, lambda rows: rows.pop(9))
    edit(other, "block_events", lambda rows: rows[123].update(block_id=3))
    text = said(capsys, "diff", f"a={run}", f"b={other}", code=1)
    assert "engine.max_num_seqs: 8 -> 9" in text
    assert "58 of 59 rows have the same tokens" in text
    assert re.search(r"row 7, sample 0: token 2 is \d+ in a, 5555 in b", text)
    assert "1 rows are in a alone, from row 9" in text
    assert "event 123: block_id is" in text


# A sweep


def test_a_sweep_shows_what_differs_against_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seqs in (4, 8):
        make_run(tmp_path / "sweep" / f"job-{seqs}", Shape(max_num_seqs=seqs))
    text = said(capsys, "analyze", f"run={tmp_path / 'sweep'}")
    assert "what differs between them: engine.max_num_seqs\n" in text
    assert re.search(r"^1 +4 .*complete$", text, re.M)
    assert re.search(r"^2 +8 .*complete$", text, re.M)


def unrecorded_answer(run: Path) -> Row:
    """The answer of a row that only an attempt without records can have given."""
    told = told_rows(run)
    return next(answer for answer in answers_of(run) if answer["row"] not in told)


def sentence(answer: Row, attempts: str) -> str:
    return (
        f"row {answer['row']} ({answer['id']}), sample 0: answered in attempt {attempts}, which was not recorded "
        f"(recorder=off); all that is known: {answer['num_prompt_tokens']} tokens in, "
        f"{answer['num_output_tokens']} out, ended by {answer['finish_reason']}\n"
    )


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_of_a_row_that_only_an_unrecorded_attempt_answered_is_told_what_is_known(
    form: str, unrecorded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(unrecorded_run, tmp_path / "run")
    answer = unrecorded_answer(run)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(answers_of(run)), run / "generations.parquet")
        (run / "generations.jsonl").unlink()
    assert said(capsys, "explain", f"run={run}", f"row={answer['row']}") == sentence(answer, "1")


def test_a_row_given_up_with_records_and_answered_without_them_has_both_lives(
    unrecorded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(unrecorded_run, tmp_path / "run")
    first = next(request for request in rows_of(run, "requests") if request["attempt"] == 0)
    answer = next(answer for answer in answers_of(run) if answer["row"] == first["row"])
    assert "not recorded" not in said(capsys, "explain", f"run={run}", f"row={first['row']}")
    edit(
        run,
        "requests",
        lambda rows: [row.update(finish_reason="aborted") for row in rows if row["row"] == first["row"]],
    )
    text = said(capsys, "explain", f"run={run}", f"row={first['row']}")
    assert "of attempt 0" in text
    assert text.endswith(sentence(answer, "1"))


def test_where_several_attempts_have_no_records_all_that_may_have_answered_are_named(
    unrecorded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(unrecorded_run, tmp_path / "run")
    answer = unrecorded_answer(run)
    edit_manifest(run, lambda manifest: [attempt.update(recorder=False) for attempt in manifest["attempts"]])
    shutil.rmtree(run / "records")
    assert said(capsys, "explain", f"run={run}", f"row={answer['row']}") == sentence(answer, "0 or 1 or 2")
    assert main("explain", [f"run={run}", "row=60"]) == 2
    assert "has no records" in capsys.readouterr().err


def test_an_answer_without_a_request_is_no_answer_where_every_attempt_was_recorded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty = copied(run, tmp_path / "run")
    edit(faulty, "requests", lambda rows: rows.pop(7))
    row = next(answer["row"] for answer in answers_of(faulty) if answer["row"] not in told_rows(faulty))
    assert main("explain", [f"run={faulty}", f"row={row}"]) == 2


def told_rows(run: Path) -> set[int]:
    return {request["row"] for request in rows_of(run, "requests")}


def answers_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
