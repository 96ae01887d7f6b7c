"""What a manifest alone says of a run: its runner, its device, its settings."""

from dataclasses import dataclass
from typing import Any

from jobs.simulation.settings import Settings
from nanovllm.runner.graph_sizes import GraphSizes, graph_sizes


@dataclass(frozen=True, slots=True)
class RunFacts:
    """All of a run but its rows that a simulation of it depends on."""

    engine: dict[str, Any]
    """As in the manifest."""
    arrives_by_time: bool
    """Whether rows came when they came, from a pipe, rather than as soon as the engine wanted them."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "RunFacts":
        return cls(manifest["engine"], manifest["config"].get("input") == "-")

    @property
    def on_gpu(self) -> bool:
        return self.engine["device"] != "cpu"

    @property
    def lookahead(self) -> int:
        """As ModelRunner.lookahead: on a GPU the next step is scheduled while one runs."""
        return 1 if self.on_gpu else 0

    @property
    def reads_shared_prefixes_once(self) -> bool:
        """Whether attention reads a prefix once for all the rows that share it."""
        return self.engine["attention"].startswith("triton")

    @property
    def suits_halves(self) -> bool:
        """Whether decode steps with enough rows and context run in halves, or would with a larger max_num_seqs."""
        found = self.engine.get("halves")
        return "in halves" in self.engine["cuda_graphs"] if found is None else found  # before `halves` stood there

    @property
    def captures_late(self) -> bool:
        """Whether graphs of steps with prefills are captured when they first come, not at the start: until `halves`
        stood in the manifest."""
        return "halves" not in self.engine

    @property
    def settings(self) -> Settings:
        engine = self.engine
        return Settings(
            block_size=engine["block_size"],
            num_blocks=engine["num_kv_blocks"],
            prefix_caching=engine["enable_prefix_caching"],
            max_num_seqs=engine["max_num_seqs"],
            max_num_batched_tokens=engine["max_num_batched_tokens"],
            max_model_len=engine["max_model_len"],
        )

    def graph_sizes(self, settings: Settings) -> GraphSizes | None:
        """Of this run's runner with other settings; None where it uses no CUDA graphs."""
        if self.engine["cuda_graphs"].startswith("off"):
            return None
        with_prefills = self.reads_shared_prefixes_once  # one kernel's work lists make both possible
        limits = settings.max_num_seqs, settings.max_num_batched_tokens
        return graph_sizes(*limits, with_prefills=with_prefills, with_halves=self.suits_halves)
