"""Seeded bugs: changed passages in methods of the engine, to show that the tests would see them."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.commit import Committer
from nanovllm.engine.running import Running
from nanovllm.engine.scheduler import Scheduler

ENGINE = (BlockManager, Running, Committer, Scheduler)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A bug: in each named method of the engine's classes, one passage replaced by another."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    """method, passage, replacement"""
    hash_bits: int = 64

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The engine has the bug, until this is left."""
        with ExitStack() as stack:
            for method, old, new in self.changes:
                cls = owner_of(method)
                stack.enter_context(patch.object(cls, method, _changed(cls, method, old, new)))
            yield


def mutant(name: str, *changes: tuple[str, str, str], hash_bits: int = 64) -> Mutant:
    return Mutant(name=name, changes=changes, hash_bits=hash_bits)


def owner_of(method: str) -> type:
    owners = [cls for cls in ENGINE if method in vars(cls)]
    assert len(owners) == 1, f"{method} is a method of {owners}, not of one class of the engine: mend the mutant"
    return owners[0]


def _changed(cls: type, method: str, old: str, new: str) -> object:
    source = inspect.getsource(vars(cls)[method])
    found = source.count(old)
    assert found == 1, f"the passage {old!r} stands {found} times in {cls.__name__}.{method}: mend the mutant"
    methods: dict[str, object] = {}
    code = compile(f"if True:\n{source.replace(old, new)}", f"<mutant of {cls.__name__}.{method}>", "exec")
    exec(code, vars(sys.modules[cls.__module__]), methods)
    return methods[method]


MUTANTS = (
    # Blocks
    mutant(
        "a block is freed twice",
        ("free", "self._empty.put(blocks[freed & ~has_hash])",
         "self._empty.put(np.repeat(blocks[freed & ~has_hash], 2))"),
    ),
    mutant(
        "a cached block is lost when its last user goes",
        ("free", "self._cached.put(blocks[freed & has_hash])", "pass"),
    ),
    mutant(
        "an evicted block stays in the index",
        ("_evict", "deque(map(self._index.__delitem__, keys), maxlen=0)", "pass"),
    ),
    mutant(
        "an evicted block keeps its content number",
        ("_evict", "self._contents[blocks] = ROOT", "pass"),
    ),
    mutant(
        "a hit does not raise the reference count",
        ("hit", "self._ref_counts[blocks] = counts = counts + 1", "self._ref_counts[blocks] = 1"),
    ),
    mutant(
        "a hit leaves the block among the evictable",
        ("hit", "self._cached.remove(blocks[counts == 0])", "pass"),
    ),
    mutant(
        "a hit is verified by the hash alone",
        ("_holding", "held.tobytes() == token_ids.tobytes()", "True"),
        hash_bits=6,
    ),
    mutant(
        "a hit is verified by hash and tokens, but not by the parent block",
        ("_walk", "self._index.get((parent, prefix_hash))",
         "next((block for (_, known), block in self._index.items() if known == prefix_hash), None)"),
        hash_bits=6,
    ),
    mutant(
        "a prefix is found where it was found before, though it has been evicted since",
        ("find_prefix", "last.num_evictions == self._num_evictions", "True"),
    ),
    mutant(
        "prompts that begin alike share the hash of the block in which they part",
        ("find_prefix", "_num_common(last.token_ids, token_ids) // size",
         "-(-_num_common(last.token_ids, token_ids) // size)"),
    ),
    mutant(
        "publishing goes on behind a hash collision",
        ("_publish_one_by_one", "self.content_of(known) if (self._tokens[known] == tokens[at]).all() else CUT",
         "self.content_of(known)"),
        hash_bits=1,
    ),
    # Publishing
    mutant(
        "a chunked prompt is published before all of it is computed",
        ("_known", "self.computed[slots], self.committed[slots]", "self.committed[slots]"
         ", self.committed[slots]"),
    ),
    mutant(
        "a prompt can be hit in the step that computes it",
        ("_admit", "budget -= count", "budget -= count; running.settle(); "
         "running._publish(np.array([slot]), np.array([(num_cached + count) // block_size]))"),
    ),
    mutant(
        "a block is published before its last token is known",
        ("_known", "self.computed[slots], self.committed[slots]", "self.computed[slots]"
         ", self.computed[slots]"),
    ),
    # Tables
    mutant(
        "one block too few for a prompt that just crosses a block's end",
        ("settle", "placed.num_tokens - num_cached", "placed.num_tokens - num_cached - (placed.num_tokens > 1)"),
    ),
    mutant(
        "a decode gets its new block one token late",
        ("_schedule_decodes", "== running.capacity[ready]", "== running.capacity[ready] + 1"),
    ),
    mutant(
        "a table entry goes to the wrong column",
        ("grow", "TableEntries(owners, columns, blocks)", "TableEntries(owners, columns + 1, blocks)"),
    ),
    mutant(
        "the runner gets a table's blocks in another order",
        ("grow", "TableEntries(owners, columns, blocks)", "TableEntries(owners, columns, blocks[::-1])"),
    ),
    mutant(
        "blocks that a hit takes out of the free ones are not counted at admission",
        ("_admit", " + (running.num_unused(hits) if num_hits else 0)", ""),
    ),
    mutant(
        "blocks that earlier admissions of the step are to get are not counted at admission",
        ("_admit", "num_wanted += -(-num_tokens", "num_wanted = -(-num_tokens"),
    ),
    mutant(
        "a hit may be evicted for an earlier admission of the step",
        ("place", "self._blocks.hit(seq.seq_id, hits)", "pass"),
        ("_enter_hits", "if len(slots) > 1:\n            self._blocks.hit(self.seq_ids[slots[1:]], hits)",
         "self._blocks.hit(self.seq_ids[slots], hits)"),
        ("settle", "for sharers in self._sharers:",
         "self.grow(slots, -(-(placed.num_tokens - num_cached) // self._blocks.block_size)); slots = slots[:0]; "
         "placed = _Placed(*(column[:0] for column in placed)); num_cached = num_cached[:0]\n"
         "        for sharers in self._sharers:"),
    ),
    mutant(
        "of those who hit the same blocks in a step only the first counts",
        ("_enter_hits", "self._blocks.hit(self.seq_ids[slots[1:]], hits)", "pass"),
    ),
    mutant(
        "blocks that several sequences give back in a step count once",
        ("free", " - self._times_before(blocks, owners)", ""),
    ),
    mutant(
        "blocks are freed from the first to the last",
        ("_free_tables", "columns = counts.cumsum().repeat(counts) - 1 - np.arange(len(owners))",
         "columns = np.arange(len(owners)) - (counts.cumsum() - counts).repeat(counts)"),
    ),
    mutant(
        "the blocks of a hit are missing in the runner's table",
        ("_enter_hits", "self._new_entries.append(TableEntries(slots.repeat(len(hits)), columns, "
         "np.tile(hits, len(slots))))", "pass"),
    ),
    mutant(
        "a hit covers the whole prompt",
        ("_admit", "(num_tokens - 1) // block_size", "num_tokens // block_size"),
    ),
    # Budget
    mutant("an admission costs no budget", ("_admit", "budget -= count", "pass")),
    mutant("a continued prefill costs no budget", ("_continue_prefills", "budget -= count", "pass")),
    mutant(
        "a sequence runs one step beyond its limit",
        ("_schedule_decodes", "running.length[order] < running.limit[order]",
         "running.length[order] <= running.limit[order]"),
    ),
    # Preemption
    mutant(
        "a preempted sequence loses its output",
        ("_preempt", "running.tokens[slot, : running.committed[slot]]",
         "running.tokens[slot, : seq.num_prompt_tokens]"),
    ),
    mutant(
        "a preempted sequence takes a token that is not known yet",
        ("_preempt", "running.tokens[slot, : running.committed[slot]]", "running.tokens[slot, : running.length[slot]]"),
    ),
    mutant(
        "a preempted sequence loses the token of its step under way",
        ("_commit_displaced", "self._append_displaced(seq, token, ended, now_ns)", "pass"),
    ),
    mutant(
        "the token of a preempted sequence is dropped though it lives",
        ("_commit_displaced", "self._append_displaced(seq, token, ended, now_ns)", "dropped.append(seq_id)"),
    ),
    mutant(
        "a preempted sequence is admitted with a step still under way",
        ("_admit", "if seq.num_in_flight:", "if False:"),
    ),
    mutant(
        "end-of-sequence is overlooked in the token of a preempted sequence",
        ("_append_displaced", "token in self._eos_token_ids", "False"),
    ),
    mutant(
        "the stop check is not told of a preempted sequence's token",
        ("_append_displaced", "seq.stops_with(token)", "token in seq.stop_token_ids"),
    ),
    mutant(
        "a preempted sequence goes to the end of the queue",
        ("_preempt", "self.waiting.appendleft(seq)", "self.waiting.append(seq)"),
    ),
    mutant(
        "leaving counts as the end of a prefill that was over",
        ("leave", "np.count_nonzero(self.computed[slots] < self.prefill_end[slots])", "len(slots)"),
    ),
    mutant(
        "a re-admitted sequence forgets when its first token came",
        ("place", ", seq.first_token_ns is not None", ", False"),
    ),
    mutant(
        "a preempted sequence waits for ever for its step under way",
        ("_commit_displaced", "self._displaced[seq_id].num_in_flight -= 1", "pass"),
    ),
    mutant(
        "a re-admitted sequence takes its output for prompt",
        ("settle", "self.prefill_end[slots] = placed.num_tokens",
         "placed.num_tokens; self.prefill_end[slots] = [self.sequence_in(slot).num_prompt_tokens for slot in slots]"),
    ),
    # Ending
    mutant(
        "the token of a sequence that has already ended is appended",
        ("take", "live = current[rows] & ~running.ended[slots]", "live = current[rows]"),
    ),
    mutant(
        "a sequence's blocks are freed while its step is under way",
        ("release_ended", " & (self.in_flight[slots] == 0)", ""),
    ),
    mutant(
        "the blocks of an aborted sequence are said to be of a finished one",
        ("end", 'reason == "abort"', "False"),
    ),
    mutant(
        "a token that was never sampled is said to be dropped",
        ("_commit_displaced", "elif token >= 0:", "else:"),
    ),
    mutant(
        "an abort forgets that a step is under way",
        ("abort", "self._displaced.pop(seq_id, None)", "pass"),
    ),
    mutant(
        "a row whose logits are not finite goes on",
        ("take", "token_ids, token_ids >= 0\n", "token_ids, token_ids >= -1\n"),
    ),
)  # fmt: skip
