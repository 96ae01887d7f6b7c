"""Seeded bugs: changed passages in methods of the engine, to show that the tests would see them."""

import inspect
from dataclasses import dataclass

from nanovllm.engine import block_manager, scheduler
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A bug: in each named method of BlockManager or Scheduler, one passage replaced by another."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    """method, passage, replacement"""
    hash_bits: int = 64

    def block_manager(self) -> type[BlockManager]:
        return _changed(BlockManager, vars(block_manager), self.changes)

    def scheduler(self) -> type[Scheduler]:
        return _changed(Scheduler, vars(scheduler), self.changes)


def mutant(name: str, *changes: tuple[str, str, str], hash_bits: int = 64) -> Mutant:
    return Mutant(name=name, changes=changes, hash_bits=hash_bits)


def _changed(cls: type, module_globals: dict[str, object], changes: tuple[tuple[str, str, str], ...]) -> type:
    """A subclass with those of the changes that are for this class; the engine itself is left alone."""
    sources = {name: inspect.getsource(vars(cls)[name]) for name, _, _ in changes if name in vars(cls)}
    for name, old, new in changes:
        if name in sources:
            found = sources[name].count(old)
            assert found == 1, f"the passage {old!r} stands {found} times in {cls.__name__}.{name}: mend the mutant"
            sources[name] = sources[name].replace(old, new)
    methods: dict[str, object] = {}
    for name, source in sources.items():
        exec(compile(f"if True:\n{source}", f"<mutant of {cls.__name__}.{name}>", "exec"), module_globals, methods)
    return type(cls.__name__, (cls,), methods)


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
        ("hit", "self._ref_counts[blocks] = counts", "self._ref_counts[blocks] = 1"),
    ),
    mutant(
        "a hit leaves the block among the evictable",
        ("hit", "self._cached.remove(blocks[unused])", "pass"),
    ),
    mutant(
        "a hit is verified by the hash alone",
        ("find_prefix", "self._tokens[found].tobytes() != wanted.tobytes()", "False"),
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
        ("_look_up", " and self._contents[last.blocks].tobytes() == last.contents", ""),
    ),
    mutant(
        "prompts that begin alike share the hash of the block in which they part",
        ("hash_prompt", "_num_common(last_ids, token_ids) // self.block_size",
         "-(-_num_common(last_ids, token_ids) // self.block_size)"),
    ),
    mutant(
        "publishing goes on behind a hash collision",
        ("publish", "self.content_of(known) if (self._tokens[known] == tokens[at]).all() else None",
         "self.content_of(known)"),
        hash_bits=1,
    ),
    # Publishing
    mutant(
        "a chunked prompt is published before all of it is computed",
        ("_num_full", "self._computed[slots], self._committed[slots]", "self._committed[slots]"
         ", self._committed[slots]"),
    ),
    mutant(
        "a prompt can be hit in the step that computes it",
        ("_admit", "budget -= count", "budget -= count; self._take_blocks(wanted); "
         "self._publish(np.array([seq.slot]), np.array([(num_cached + count) // self.blocks.block_size]))"),
    ),
    mutant(
        "a block is published before its last token is known",
        ("_num_full", "self._computed[slots], self._committed[slots]", "self._computed[slots]"
         ", self._computed[slots]"),
    ),
    # Tables
    mutant(
        "one block too few for a prompt that just crosses a block's end",
        ("_num_blocks_of", "-(-len(seq.token_ids) // self.blocks.block_size)",
         "-(-(len(seq.token_ids) - 1) // self.blocks.block_size) or 1"),
    ),
    mutant(
        "a decode gets its new block one token late",
        ("_schedule_decodes", "== self._capacity[ready]", "== self._capacity[ready] + 1"),
    ),
    mutant(
        "a table entry goes to the wrong column",
        ("_grow", "_TableEntries(owners, columns, blocks)", "_TableEntries(owners, columns + 1, blocks)"),
    ),
    mutant(
        "the runner gets a table's blocks in another order",
        ("_grow", "_TableEntries(owners, columns, blocks)", "_TableEntries(owners, columns, blocks[::-1])"),
    ),
    mutant(
        "blocks that a hit takes out of the free ones are not counted at admission",
        ("_fits", " + self.blocks.num_unused(hits)", ""),
    ),
    mutant(
        "blocks that earlier admissions of the step are to get are not counted at admission",
        ("_fits", " + num_wanted", ""),
    ),
    mutant(
        "a hit may be evicted for an earlier admission of the step",
        ("_admit", "if self.blocks.num_cached < num_cached:", "if False:"),
    ),
    mutant(
        "blocks are freed from the first to the last",
        ("free", "[table[::-1] for table in tables]", "tables"),
    ),
    mutant(
        "the blocks of a hit are missing in the runner's table",
        ("_place", "self._enter(slot, hits)", "self._capacity[slot] += len(hits) * self.blocks.block_size"),
    ),
    mutant(
        "a hit covers the whole prompt",
        ("_prefix", "(len(seq.token_ids) - 1) // self.blocks.block_size",
         "len(seq.token_ids) // self.blocks.block_size"),
    ),
    # Budget
    mutant("an admission costs no budget", ("_admit", "budget -= count", "pass")),
    mutant("a continued prefill costs no budget", ("_continue_prefills", "budget -= count", "pass")),
    mutant(
        "a sequence runs one step beyond its limit",
        ("_schedule_decodes", "self._length[order] < self._limit[order]", "self._length[order] <= self._limit[order]"),
    ),
    # Preemption
    mutant(
        "a preempted sequence loses its output",
        ("_preempt", "self._tokens[slot, : self._committed[slot]]", "self._tokens[slot, : seq.num_prompt_tokens]"),
    ),
    mutant(
        "a preempted sequence takes a token that is not known yet",
        ("_preempt", "self._tokens[slot, : self._committed[slot]]", "self._tokens[slot, : self._length[slot]]"),
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
        ("_admit", "if seq.num_in_flight or not", "if not"),
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
        ("_leave", "np.count_nonzero(self._computed[slots] < self._prefill_end[slots])", "len(slots)"),
    ),
    mutant(
        "a re-admitted sequence forgets when its first token came",
        ("_place", "self._has_first_token[slot] = seq.first_token_ns is not None",
         "self._has_first_token[slot] = False"),
    ),
    mutant(
        "a preempted sequence waits for ever for its step under way",
        ("_commit_displaced", "self._displaced[seq_id].num_in_flight -= 1", "pass"),
    ),
    mutant(
        "a re-admitted sequence takes its output for prompt",
        ("_place", "self._prefill_end[slot] = num_tokens", "self._prefill_end[slot] = seq.num_prompt_tokens"),
    ),
    # Ending
    mutant(
        "the token of a sequence that has already ended is appended",
        ("commit", "live = current[rows] & ~self._ended[slots]", "live = current[rows]"),
    ),
    mutant(
        "a sequence's blocks are freed while its step is under way",
        ("_release_ended", " & (self._in_flight[slots] == 0)", ""),
    ),
    mutant(
        "the blocks of an aborted sequence are said to be of a finished one",
        ("_free_reason", "return ABORTED", "return FINISHED"),
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
        ("commit", "token_ids, token_ids >= 0\n", "token_ids, token_ids >= -1\n"),
    ),
)  # fmt: skip
