"""What crosses the seam between the scheduler and a device, and nothing else."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from nanovllm.sampling_params import ResolvedSampling


class Admission(NamedTuple):
    """A sequence that takes a slot in this step; it keeps the slot until it ends or is preempted."""

    slot: int
    seq_id: int
    row: int
    sample: int
    sampling: ResolvedSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One scheduling step. Arrays have one entry for each sequence, decodes first, unless said otherwise.

    A decode row's only input is the token that its slot sampled last; the runner has it on the device. A prefill row's
    inputs are in `prefill_token_ids`. Block tables are persistent in the runner: a step carries only their new entries,
    which must be applied before it runs. An admission empties its slot's table first.
    """

    step: int
    seq_ids: np.ndarray
    """int64 [rows]"""
    slots: np.ndarray
    """int32 [rows]; a sequence's place in the runner's persistent state."""
    starts: np.ndarray
    """int32 [rows]; tokens whose KV is there before the step, which is also the position of the first new one."""
    num_tokens: np.ndarray
    """int32 [rows]; tokens computed now."""
    samples: np.ndarray
    """bool [rows]; whether the row's last logits are sampled."""
    num_decodes: int
    """The first num_decodes rows are decodes."""
    prefill_token_ids: np.ndarray
    """int32 [tokens of the prefill rows, packed in row order]."""
    admissions: tuple[Admission, ...]
    table_slots: np.ndarray
    """int32 [new block table entries]; with `table_columns` and `table_blocks`: table[slot, column] = block."""
    table_columns: np.ndarray
    table_blocks: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.seq_ids)

    @property
    def num_prefill_tokens(self) -> int:
        return len(self.prefill_token_ids)

    @property
    def phase(self) -> str:
        """prefill, decode or mixed"""
        if self.num_decodes == 0:
            return "prefill"
        return "decode" if self.num_decodes == self.num_rows else "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a runner gives back for one plan."""

    token_ids: np.ndarray
    """int32 [rows that sample, in row order]; -1 where the logits were not finite."""
    prepare_ms: float = 0.0
    """Host time to turn the plan into tensors and, on a device that works beside the host, to launch the step."""
    forward_ms: float = 0.0
    """Device time of model and sampling."""
    padded_batch_size: int = 0
    """Rows of the CUDA graph that ran; the plan's rows where none did, or a step with prefills, padded by tokens."""
    padded_tokens: int = 0
    """Tokens of the CUDA graph that ran; 0 where none did."""
    cuda_graph: bool = False
    in_halves: bool = False
    """Whether a decode step ran as two halves beside each other."""
    logits_rows: int = 0
    """Rows of logits that were really computed."""
    device_allocated_bytes: int = 0
    device_reserved_bytes: int = 0
    comm_calls: int = 0
    comm_bytes: int = 0


class Runner(Protocol):
    """Runs plans in the order in which they are submitted."""

    lookahead: int
    """Plans that may be submitted before the oldest result is collected: 0 for a runner that works at once."""

    def submit(self, plan: Plan) -> None:
        """Start the step. May return before it has run; nothing of the plan is read afterwards."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step that was submitted and not collected."""
        ...
