"""What an audit finds: which law is broken, and where."""

from dataclasses import dataclass

WHOLE_RUN = 2**62
"""Place of what no single step shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    law: str
    detail: str
    replica: int = 0
    attempt: int = 0
    step: int | None = None
    block_id: int | None = None
    seq_id: int | None = None
    event: int = WHOLE_RUN
    """Row of the block event within its replica and attempt, where it is one that breaks the law."""

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Sorts by when it happened."""
        return self.attempt, WHOLE_RUN if self.step is None else self.step, self.event, self.replica

    def __str__(self) -> str:
        named = {"replica": self.replica, "attempt": self.attempt, "step": self.step}
        named |= {"block": self.block_id, "seq_id": self.seq_id}
        where = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
        return f"{where}: {self.law}: {self.detail}"
