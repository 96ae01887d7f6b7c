"""Benchmarks: `python -m jobs.bench NAME` or `python -m jobs.bench workload=...`. The last line printed is JSON."""

import importlib
import sys

EXIT_USAGE = 2
WORKLOAD = "workload="
ROWS = "rows"

BENCHMARKS = {
    "host": ("jobs.bench_host", "host work of decode and prefill steps, without a device"),
    "kernels": ("jobs.bench_kernels", "each kernel alone, beside torch, flash-attn and the bound"),
    "trace": ("jobs.bench_trace", "a profiler's look at a few steps of each workload: idle share, time by kernel"),
    "transformers": (
        "jobs.bench_transformers",
        "the embedded model beside transformers' batched generate, on the bundled prompts",
    ),
}


def main(words: list[str]) -> int:
    if words[:1] == [ROWS]:
        return _rows(words[1:])
    if any("=" in word or word.startswith("-") for word in words):
        return _workloads(words)
    if len(words) != 1 or words[0] not in BENCHMARKS:
        print(_usage(words), file=sys.stderr)
        return EXIT_USAGE
    try:
        importlib.import_module(BENCHMARKS[words[0]][0]).run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _rows(words: list[str]) -> int:
    from jobs.bench_rows import write_rows

    try:
        write_rows(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _usage(words: list[str]) -> str:
    from jobs.workloads import WORKLOADS

    lines = [f"error: jobs.bench takes one benchmark's name or workload=..., not {' '.join(words) or 'nothing'}:"]
    lines += [f"  python -m jobs.bench {name:14s} {about}" for name, (_, about) in BENCHMARKS.items()]
    lines += ["  python -m jobs.bench rows workload=NAME out=FILE    a workload as a generate job's input"]
    lines += [f"  python -m jobs.bench workload={','.join(WORKLOADS)}"]
    lines += [f"    {name:10s} {kind.about}" for name, kind in WORKLOADS.items()]
    return "\n".join(lines)


def _workloads(words: list[str]) -> int:
    """The engine or a peer on the workloads, through Hydra."""
    try:
        importlib.import_module("nanovllm")  # refuses a bad NANOVLLM_LOG_LEVEL
        listed = [_listed(word) if word.startswith(WORKLOAD) else word for word in words]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    from jobs.bench_workloads import COMMAND
    from jobs.launch import launch

    return launch(COMMAND, listed)


def _listed(word: str) -> str:
    """`workload=a,b` as the list that Hydra reads without quotes; ValueError for what is no workload."""
    from jobs.workloads import check_workloads

    text = word.removeprefix(WORKLOAD)
    if text.startswith("[") and text.endswith("]"):  # as a sweep hands it on
        text = text[1:-1]
    names = [name.strip() for name in text.split(",")]
    check_workloads("workload", names)
    return f"{WORKLOAD}[{','.join(names)}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
