"""What simulations of one run have in common, and how it gets from one process to another."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from jobs.simulation.cost_model import CostModel
from jobs.simulation.recorded_rows import RecordedRows
from jobs.simulation.run_facts import RunFacts
from jobs.simulation.settings import Settings
from jobs.simulation.simulator import Outcome, simulate

_CAUSES = "causes.json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Causes:
    facts: RunFacts
    model: CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Rows, the machine that they run on, and what its steps cost."""

    facts: RunFacts
    rows: RecordedRows
    model: CostModel

    def outcome(self, settings: Settings) -> Outcome:
        """Without what each step reads once for several rows."""
        return replace(simulate(self.facts, self.rows, self.model, settings), shared=[])

    def save(self, directory: Path) -> None:
        self.rows.save(directory)
        (directory / _CAUSES).write_bytes(encoded(_Causes(facts=self.facts, model=self.model)))

    @classmethod
    def load(cls, directory: Path) -> "Subject":
        """What `save` has written there; the rows are mapped, not read, and the files may be deleted afterwards."""
        causes = decoded((directory / _CAUSES).read_bytes(), _Causes)
        return cls(facts=causes.facts, rows=RecordedRows.load(directory), model=causes.model)


def encoded(value: object) -> bytes:
    """One line of JSON, from which `decoded` makes the same again: finite floats keep every digit, arrays are lists.

    An empty array comes back as one of float64.
    """
    return msgspec.json.encode(value, enc_hook=_to_list)


def decoded(data: bytes, kind: type[T]) -> T:
    return msgspec.json.decode(data, type=kind, dec_hook=_to_array)


def _to_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not sent between processes")


def _to_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        array = np.array(value)
        if array.dtype == object:
            raise ValueError(f"an array holds what is no number: {value[:3]} ...")
        return array
    raise TypeError(f"{kind.__name__} is not sent between processes")
