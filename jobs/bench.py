"""Benchmarks: `python -m jobs.bench host` and `python -m jobs.bench transformers`. The last line printed is JSON."""

import sys

BENCHMARKS = {
    "host": "host work of a decode step of 256 sequences, without a device",
    "transformers": "the embedded model beside transformers' batched generate, on the bundled prompts",
}


def main(words: list[str]) -> int:
    if len(words) != 1 or words[0] not in BENCHMARKS:
        known = "\n".join(f"  python -m jobs.bench {name:14s} {what}" for name, what in BENCHMARKS.items())
        print(
            f"error: jobs.bench takes one benchmark's name, not {' '.join(words) or 'nothing'}:\n{known}",
            file=sys.stderr,
        )
        return 2
    if words[0] == "host":
        from jobs import bench_host as benchmark
    else:
        from jobs import bench_transformers as benchmark
    benchmark.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
