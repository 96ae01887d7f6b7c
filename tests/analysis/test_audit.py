"""The audit passes what the engine records, and names each fault that is put into it."""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.analysis.audit import audit
from jobs.analysis.ledger import BlockEventColumns, Ledger
from jobs.analysis.program import main
from jobs.record_schemas import BLOCK_EVENTS
from nanovllm.events import BlockEvent
from tests.analysis.editing import Row, copied, edit, edit_answers, edit_manifest, rows_of, write_table
from tests.analysis.made_run import Shape, make_run
from tests.engine.ledger import Ledger as Replay
from tests.engine.ledger import LedgerError

NUM_BLOCKS = 40


def test_the_golden_runs_have_everything_that_an_audit_is_about(run: Path, plain_run: Path, resumed_run: Path) -> None:
    for path in (run, plain_run):
        events = rows_of(path, "block_events")
        assert {event["event"] for event in events} == {"allocate", "hit", "commit", "free", "release", "evict"}
        assert {event["reason"] for event in events} == {None, "finished", "preempted"}
    steps = rows_of(run, "steps")
    assert any(step["dropped_seq_ids"] for step in steps), "look-ahead drops tokens"
    assert any(after["start_ns"] < step["end_ns"] for step, after in itertools.pairwise(steps))
    assert any(step["padded_num_tokens"] > sum(step["seq_num_tokens"]) for step in steps)
    assert {step["in_halves"] for step in steps if step["phase"] == "decode"} == {False, True}
    assert {step["attempt"] for step in rows_of(resumed_run, "steps")} == {0, 1, 2}
    reach = max(event["step"] for event in rows_of(resumed_run, "block_events") if event["attempt"] == 0)
    assert reach > 40, "a killed attempt's block events reach further than its steps"


def test_what_the_engine_records_is_sound(run: Path, plain_run: Path, resumed_run: Path) -> None:
    for path in (run, plain_run, resumed_run):
        found = audit(path)
        assert found.first is None, str(found)
        assert found.num_block_events > 1000
        assert found.num_requests >= 60


# One ledger event by event, one in columns: they must stop at the same event


def columns(rows: list[Row]) -> BlockEventColumns:
    return BlockEventColumns.of(pa.Table.from_pylist(rows, BLOCK_EVENTS))


def first_fault_of_replay(rows: list[Row]) -> int | None:
    replay = Replay(NUM_BLOCKS)
    for at, row in enumerate(rows):
        try:
            replay.apply(BlockEvent(*(row[name] for name in BlockEvent._fields)))
        except LedgerError:
            return at
    return None


def first_fault_of_columns(rows: list[Row]) -> int | None:
    faults = Ledger(columns(rows), NUM_BLOCKS).violations(0, 0)
    return min((fault.event for fault in faults), default=None)


def corrupted(rows: list[Row], rng: random.Random) -> tuple[str, list[Row]]:
    rows = [dict(row) for row in rows]
    at = rng.randrange(len(rows) - 1)
    kind = rng.choice(
        ["drop", "repeat", "swap", "event", "block_id", "seq_id", "ref_count", "block_hash", "free_blocks"]
    )
    if kind == "drop":
        del rows[at]
    elif kind == "repeat":
        rows.insert(at, dict(rows[at]))
    elif kind == "swap":
        rows[at], rows[at + 1] = rows[at + 1], rows[at]
    elif kind == "event":
        rows[at]["event"] = rng.choice(["allocate", "hit", "commit", "free", "release", "evict", "lost"])
    elif kind == "block_hash":
        rows[at]["block_hash"] = rng.choice([None, 1, rng.choice(rows)["block_hash"]])
    else:
        rows[at][kind] = rng.choice([rng.choice(rows)[kind], rows[at][kind] + 1])
    return kind, rows


def test_both_ledgers_stop_at_the_same_event(run: Path, plain_run: Path) -> None:
    rng = random.Random(5)
    seen: Counter[str] = Counter()
    for path in (run, plain_run):
        rows = rows_of(path, "block_events")[:900]
        assert first_fault_of_replay(rows) is first_fault_of_columns(rows) is None
        for _ in range(150):
            kind, faulty = corrupted(rows, rng)
            expected, found = first_fault_of_replay(faulty), first_fault_of_columns(faulty)
            if expected is None:  # such as two events of different sequences that change places, or a value put back
                seen["harmless"] += 1
                assert found is None or "another place" in str(Ledger(columns(faulty), NUM_BLOCKS).violations(0, 0)[0])
                continue
            assert found is not None, (kind, expected)
            assert found <= expected, (kind, expected, found)
            if found < expected:
                laws = {f.law for f in Ledger(columns(faulty), NUM_BLOCKS).violations(0, 0) if f.event == found}
                assert laws == {"a hit at another place of the prefix than the block was committed for"}, (kind, laws)
            seen[kind] += 1
    assert min(seen[kind] for kind in ("drop", "repeat", "event", "block_id", "seq_id", "ref_count")) > 5, seen


# Faults, one of each kind

Change = Callable[[list[Row]], Any]


def first_of(rows: list[Row], **wanted: object) -> Row:
    return next(row for row in rows if all(row[name] == value for name, value in wanted.items()))


def with_tokens(rows: list[Row]) -> Row:
    return next(row for row in rows if row["num_output_tokens"] > 3)


def unpublish_hit(rows: list[Row]) -> None:
    hit = first_of(rows, event="hit")
    block = hit["block_id"]
    at = next(i for i, row in enumerate(rows) if row["event"] == "commit" and row["block_id"] == block)
    del rows[at]


def take_twice(rows: list[Row]) -> None:
    at = next(i for i, row in enumerate(rows) if row["event"] == "allocate" and i > 20)
    owner = next(
        row for row in reversed(rows[:at]) if row["event"] == "allocate" and row["seq_id"] != rows[at]["seq_id"]
    )
    rows[at]["block_id"] = owner["block_id"]


def change_sampled(rows: list[Row]) -> None:
    step = next(row for row in rows[30:] if any(row["seq_sampled"]))
    step["seq_sampled"][step["seq_sampled"].index(True)] = False


BLOCKS: list[tuple[str, Change, str]] = [
    ("a block in two tables", take_twice, "a block is taken that is in use"),
    ("an uncommitted hit", unpublish_hit, "a hit on a block that holds no prefix"),
    ("a free too many", lambda rows: rows.append(dict(first_of(rows, event="free"), step=10**6)), "negative"),
    ("another hash", lambda rows: first_of(rows, event="hit").update(block_hash=7), "not the one that was committed"),
    ("a wrong count", lambda rows: rows[50].update(ref_count=9), "the reference count differs"),
    ("a wrong pool", lambda rows: rows[50].update(free_blocks=3), "free and used blocks do not add up"),
    ("an early eviction", lambda rows: rows.insert(0, first_of(rows, event="evict")), "without a prefix is evicted"),
    ("a reason", lambda rows: first_of(rows, event="free").update(reason=None), "a reason is missing"),
    ("an unknown word", lambda rows: rows[9].update(event="borrow"), "no such event"),
    ("an unknown block", lambda rows: rows[9].update(block_id=40), "no such block"),
    ("a block kept", lambda rows: rows.pop(), "blocks are in use at the end"),
]
STEPS: list[tuple[str, Change, str]] = [
    ("a missing step", lambda rows: rows.pop(20), "step numbers have a gap"),
    ("the pool", lambda rows: rows[30].update(free_blocks=rows[30]["free_blocks"] - 1), "free_blocks + used_blocks"),
    (
        "cached blocks",
        lambda rows: rows[30].update(cached_blocks=rows[30]["cached_blocks"] + 1),
        "cached_blocks differs",
    ),
    ("a token less", change_sampled, "num_output_tokens differs"),
    ("a token dropped", lambda rows: rows[30]["dropped_seq_ids"].append(rows[30]["seq_ids"][0]), "num_output_tokens"),
    ("a sum", lambda rows: rows[30].update(num_decode_tokens=99), "num_prefill_tokens + num_decode_tokens"),
    ("a context", lambda rows: rows[30]["seq_context_lens"].__setitem__(0, 99), "a context does not go on"),
    ("a sequence twice", lambda rows: [rows[30][n].append(rows[30][n][0]) for n in LISTS], "twice in one batch"),
    ("prefills in halves", lambda rows: first_of(rows, phase="mixed").update(in_halves=True), "a step in halves"),
    (
        "halves without a graph",
        lambda rows: first_of(rows, in_halves=True).update(cuda_graph=False),
        "a step in halves cannot have run so",
    ),
    (
        "a half without a row",
        lambda rows: next(row for row in rows if row["batch_size"] == 1 and row["cuda_graph"]).update(in_halves=True),
        "a step in halves cannot have run so",
    ),
    ("the batch", lambda rows: rows[30].update(batch_size=1), "batch_size differs"),
    (
        "an end too many",
        lambda rows: rows[30].update(finished_seq_ids=[0], num_finished=1),
        "does not end exactly once",
    ),
]
LISTS = ("seq_ids", "seq_num_tokens", "seq_context_lens", "seq_cached_tokens", "seq_sampled")
REQUESTS: list[tuple[str, Change, str]] = [
    ("its tokens", lambda rows: with_tokens(rows).update(num_output_tokens=3), "a request's num_output_tokens differs"),
    ("its hits", lambda rows: rows[30].update(num_cached_tokens=1), "a request's num_cached_tokens differs"),
    ("preemptions", lambda rows: rows[30].update(num_preemptions=9), "a request's num_preemptions differs"),
    ("a seq_id twice", lambda rows: rows.append(dict(rows[3], row=99)), "a seq_id is used twice"),
    ("a row twice", lambda rows: rows[30].update(row=rows[31]["row"]), "a row is computed twice"),
    ("a lost request", lambda rows: rows.pop(30), "a row has no request"),
]
ANSWERS: list[tuple[str, Change, str]] = [
    ("a lost row", lambda rows: rows.pop(7), "a row is missing"),
    ("a row twice", lambda rows: rows.append(rows[7]), "a row is answered more than once"),
    ("a token more", lambda rows: rows[7]["token_ids"].append(5), "num_output_tokens is not the number of token_ids"),
    ("a row too many", lambda rows: rows.append(dict(rows[7], row=60)), "a row is not one of the run's"),
    ("other tokens", lambda rows: rows[7].update(num_output_tokens=1, token_ids=[4]), "not its request's"),
]


@pytest.mark.parametrize(
    ("table", "what", "change", "law"),
    [
        *(("block_events", *fault) for fault in BLOCKS),
        *(("steps", *fault) for fault in STEPS),
        *(("requests", *fault) for fault in REQUESTS),
        *(("answers", *fault) for fault in ANSWERS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_in_the_records_is_caught(
    table: str, what: str, change: Change, law: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty = copied(run, tmp_path / "run")
    if table == "answers":
        edit_answers(faulty, change)
    else:
        edit(faulty, table, change)

    code = main("audit", [f"run={faulty}"])

    assert code == 1, what
    found = audit(faulty)
    assert law in " | ".join(v.law for v in found.violations), str(found.violations)
    assert str(found.first) in capsys.readouterr().out


def test_only_an_engine_that_can_runs_steps_in_halves(run: Path, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "run")
    edit_manifest(other, lambda manifest: manifest["engine"].update(halves=False))
    first = audit(other).first
    assert first is not None
    halved = first_of(rows_of(run, "steps"), in_halves=True)
    assert (first.law, first.step) == ("a step in halves cannot have run so", halved["step"])
    edit_manifest(other, lambda manifest: manifest["engine"].pop("halves"))
    assert audit(other).first is None, "an older version's manifest does not say"


def test_the_first_violation_names_where_it_is(run: Path, tmp_path: Path) -> None:
    faulty = copied(run, tmp_path / "run")
    edit(faulty, "block_events", lambda rows: [rows[at].update(ref_count=9) for at in (400, 90, 700)])
    event = rows_of(faulty, "block_events")[90]

    first = audit(faulty).first

    assert first is not None
    assert (first.attempt, first.step, first.block_id, first.seq_id, first.event) == (
        0, event["step"], event["block_id"], event["seq_id"], 90,
    )  # fmt: skip
    assert f"attempt 0, step {event['step']}, block {event['block_id']}, seq_id {event['seq_id']}" in str(first)


def test_a_fault_in_a_later_attempt_is_that_attempts(resumed_run: Path, tmp_path: Path) -> None:
    faulty = copied(resumed_run, tmp_path / "run")
    edit(faulty, "block_events", lambda rows: first_of(rows, attempt=2, event="hit").update(ref_count=5))

    first = audit(faulty).first

    assert first is not None
    assert first.attempt == 2
    assert first.law == "the reference count differs from the block's users"


def test_a_row_that_two_attempts_computed_counts_once(resumed_run: Path, tmp_path: Path) -> None:
    """An attempt that dies between a row's end and its acknowledgement leaves a request whose row is computed again."""
    again = copied(resumed_run, tmp_path / "run")
    requests = rows_of(again, "requests")
    died = next(request for request in requests if request["attempt"] == 0)
    answered = next(request for request in requests if request["attempt"] == 2)
    died |= {"row": answered["row"]}
    write_table(again, "requests", requests)
    assert audit(again).first is None
    edit_answers(again, lambda rows: rows.pop(rows.index(first_of(rows, row=answered["row"]))))
    first = audit(again).first
    assert first is not None
    assert first.law == "a row is missing", "two requests, and not one answer"


def test_attempts_with_other_blocks_are_audited_by_their_own(tmp_path: Path) -> None:
    """A resumed run may have other settings than before."""
    run = make_run(tmp_path / "run", stops_after=[41], resumed_as=Shape(num_blocks=30, block_size=8))
    assert audit(run).first is None, str(audit(run))
    assert main("analyze", [f"run={run}"]) == 0
    edit_manifest(run, lambda manifest: manifest["attempts"][0].update(engine=manifest["engine"]))
    assert audit(run).first is not None, "the negative control: attempt 0 with the blocks of attempt 1"


def test_a_killed_run_is_audited_as_far_as_it_goes(resumed_run: Path, tmp_path: Path) -> None:
    killed = copied(resumed_run, tmp_path / "run")
    for table in ("steps", "block_events", "requests"):
        write_table(killed, table, [row for row in rows_of(killed, table) if row["attempt"] == 0])
    edit_manifest(killed, lambda manifest: manifest.update(status="running", attempts=manifest["attempts"][:1]))
    lines = (killed / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "generations.jsonl").unlink()
    (killed / "generations.partial.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])

    assert audit(killed).first is None
    edit(killed, "block_events", lambda rows: rows[-5].update(ref_count=77))
    assert audit(killed).first is not None


# Attempts without records, and attempts whose records break off


def test_an_attempt_that_was_not_recorded_is_in_no_law(unrecorded_run: Path, tmp_path: Path) -> None:
    found = audit(unrecorded_run)
    assert found.first is None, str(found)
    assert "\n  attempt 1 ran with recorder=off" in str(found)
    taken_for_recorded = copied(unrecorded_run, tmp_path / "run")
    edit_manifest(taken_for_recorded, lambda manifest: manifest["attempts"][1].pop("recorder"))
    first = audit(taken_for_recorded).first
    assert first is not None
    assert first.law == "step numbers have a gap"


@pytest.mark.parametrize("off_by", [-1, 1])
def test_steps_go_on_just_behind_those_of_an_attempt_that_was_not_recorded(
    off_by: int, unrecorded_run: Path, tmp_path: Path
) -> None:
    faulty = copied(unrecorded_run, tmp_path / "run")
    edit_manifest(
        faulty,
        lambda manifest: manifest["attempts"][1].update(last_step=manifest["attempts"][1]["last_step"] + off_by),
    )
    first = audit(faulty).first
    assert first is not None
    assert (first.law, first.attempt) == ("step numbers have a gap", 2)


def test_a_request_of_a_recorded_attempt_still_needs_its_row(unrecorded_run: Path, tmp_path: Path) -> None:
    faulty = copied(unrecorded_run, tmp_path / "run")
    row = next(request["row"] for request in rows_of(faulty, "requests") if request["attempt"] == 2)
    edit_answers(faulty, lambda rows: first_of(rows, row=row).update(num_prompt_tokens=1))
    first = audit(faulty).first
    assert first is not None
    assert first.law == "a row's tokens are not its request's"


def test_records_that_broke_off_are_audited_like_a_killed_attempts(run: Path, tmp_path: Path) -> None:
    broken = copied(run, tmp_path / "run")
    last = rows_of(run, "steps")[60]["step"]
    for table, time in (("steps", "step"), ("block_events", "step")):
        write_table(broken, table, [row for row in rows_of(run, table) if row[time] <= last])
    ends = {seq_id for step in rows_of(broken, "steps") for seq_id in step["finished_seq_ids"]}
    write_table(broken, "requests", [row for row in rows_of(run, "requests") if row["seq_id"] in ends])
    done = {row["row"] for row in rows_of(broken, "requests")}
    lines = (broken / "generations.jsonl").read_text().splitlines()
    (broken / "generations.jsonl").write_text("".join(f"{lines[row]}\n" for row in sorted(done)))

    def failed(manifest: Row) -> None:
        manifest |= {"status": "failed"}
        manifest["attempts"][0] |= {"status": "failed", "sealed": False}

    edit_manifest(broken, failed)
    assert audit(broken).first is None, str(audit(broken))
    edit_manifest(broken, lambda manifest: manifest["attempts"][0].update(sealed=True))
    first = audit(broken).first
    assert first is not None
    assert first.law == "blocks are in use at the end"
