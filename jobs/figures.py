"""What a run amounts to: counted from the engine's events, shown at the end, kept in the manifest."""

from dataclasses import asdict, dataclass

from nanovllm.events import ArrivalEvent, Recorder, RequestEvent, StepEvent


@dataclass(slots=True)
class Figures(Recorder):
    """Counts of one run. Times are the run's clock's, in nanoseconds."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Of the sequences that the engine took in."""
    num_cached_prompt_tokens: int = 0
    """Of those, the ones that came from the prefix cache when their sequence first ran."""
    num_output_tokens: int = 0
    """Of the sequences that have ended."""
    num_sampled_tokens: int = 0
    num_preemptions: int = 0
    first_step_start_ns: int | None = None
    last_step_end_ns: int | None = None

    def on_arrival(self, event: ArrivalEvent) -> None:
        self.num_prompt_tokens += len(event.prompt_token_ids)

    def on_step(self, event: StepEvent) -> None:
        self.num_steps += 1
        self.num_sampled_tokens += len(event.result.token_ids)
        self.num_preemptions += len(event.schedule.preemptions)
        if self.first_step_start_ns is None:
            self.first_step_start_ns = event.schedule.start_ns
        self.last_step_end_ns = event.end_ns

    def on_request(self, event: RequestEvent) -> None:
        self.num_cached_prompt_tokens += event.num_cached_tokens
        self.num_output_tokens += event.num_output_tokens

    @property
    def seconds(self) -> float:
        """From the first step's start to the last one's end."""
        if self.first_step_start_ns is None or self.last_step_end_ns is None:
            return 0.0
        return (self.last_step_end_ns - self.first_step_start_ns) / 1e9

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.seconds if self.seconds else 0.0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of prompt tokens that came from the prefix cache."""
        return self.num_cached_prompt_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    def facts(self) -> dict[str, object]:
        """For the manifest."""
        return {
            **asdict(self),
            "seconds": self.seconds,
            "output_tokens_per_s": self.output_tokens_per_s,
            "prefix_cache_hit_rate": self.prefix_cache_hit_rate,
        }

    def lines(self) -> list[tuple[str, str]]:
        """(name, value) for the terminal."""
        rate = self.output_tokens_per_s
        return [
            ("tokens", f"{self.num_prompt_tokens:,} in, {self.num_output_tokens:,} out"),
            ("speed", f"{rate:,.{0 if rate >= 10 else 1}f} output tok/s over {self.seconds:.2f} s"),
            ("prefix cache", f"{self.prefix_cache_hit_rate:.1%} of the prompt tokens were cached"),
            ("preemptions", f"{self.num_preemptions}"),
        ]
