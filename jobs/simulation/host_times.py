"""When the host did what in a recorded run: what the records say, and what follows from it. Milliseconds."""

from dataclasses import dataclass

import numpy as np

from jobs.simulation.recorded_run import RecordedRun

WAITED_MS = 0.02
"""The host has waited for a step's result, and did not come late for it, if it was there so long before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BetweenSteps:
    """The host's time from the end of a commit to the next step's scheduling; arrays [gaps]."""

    ms: np.ndarray
    num_finished: np.ndarray
    rows_in: np.ndarray
    tokens_in: np.ndarray
    """Of the prompts of the rows that were taken in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGaps:
    """What passed from the moment a step could begin on the device until the host had its result, without the forward
    time; arrays [steps for which that can be told]."""

    ms: np.ndarray
    step: np.ndarray
    """Place among the recorded steps."""


class HostTimes:
    """Arrays have an entry for each recorded step."""

    def __init__(self, run: RecordedRun) -> None:
        self.schedule = run.column("schedule_ms")
        self.prepare = run.column("prepare_ms")
        self.forward = run.column("forward_ms")
        self.postprocess = run.column("postprocess_ms")
        self.start = run.column("start_ns") / 1e6
        self.end = run.column("end_ns") / 1e6
        self.launched = self.start + self.schedule + self.prepare
        self._attempt = run.column("attempt")
        self._num_finished = run.column("num_finished")
        requests = run.requests
        order = np.argsort(requests["seq_id"].to_numpy())
        self._arrived = requests["arrived_ns"].to_numpy()[order] / 1e6
        self._prompt_tokens = np.concatenate([[0], np.cumsum(requests["num_prompt_tokens"].to_numpy()[order])])

    def device_gaps(self) -> DeviceGaps:
        """Of the steps that the host waited for, and whose beginning is known."""
        last_submit = np.searchsorted(self.start, self.end, "right") - 1
        waited = self.end - self.launched[last_submit] > WAITED_MS
        before = np.concatenate([[-np.inf], self.end[:-1]])
        before[1:][self._attempt[1:] != self._attempt[:-1]] = -np.inf
        idle_device = before <= self.launched
        begin_known = idle_device | np.concatenate([[False], waited[:-1]])
        ms = self.end - np.maximum(before, self.launched) - self.forward
        step = np.flatnonzero(waited & begin_known)
        return DeviceGaps(ms=np.maximum(ms[step], 0.0), step=step)

    def between_steps(self) -> BetweenSteps:
        following = np.searchsorted(self.start, self.end, "right")
        at = np.flatnonzero(following < len(self.start))
        following = following[at]
        next_end = np.append(self.end, np.inf)[at + 1]
        same = self._attempt[at] == self._attempt[following]
        alone = (next_end > self.start[following]) & same  # no second commit before it
        at, following = at[alone], following[alone]
        ms = self.start[following] - self.end[at] - self.postprocess[at]
        first = np.searchsorted(self._arrived, self.end[at])
        past = np.searchsorted(self._arrived, self.start[following])
        return BetweenSteps(
            ms=np.maximum(ms, 0.0),
            num_finished=self._num_finished[at],
            rows_in=past - first,
            tokens_in=self._prompt_tokens[past] - self._prompt_tokens[first],
        )

    def late_captures(self, is_first: np.ndarray, prepared: np.ndarray) -> np.ndarray:
        """What the capture of a graph took in the steps `is_first`, whose preparing would take `prepared` [steps].

        It begins when the device is done with the step before.
        """
        begun = np.maximum(
            np.concatenate([[-np.inf], self.launched[:-1]]), np.concatenate([[-np.inf] * 2, self.end[:-2]])
        )
        device_done = begun + np.concatenate([[0.0], self.forward[:-1]])
        waiting = np.maximum(device_done - (self.start + self.schedule), 0.0)
        return np.maximum(self.prepare - prepared - waiting, 0.0)[is_first]
