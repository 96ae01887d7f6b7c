"""What a recorded run would have been with other settings: python -m jobs.simulate run=DIR kv.block_size=16,64"""

import importlib
import sys

EXIT_DONE, EXIT_USAGE = 0, 2


def main(words: list[str]) -> int:
    """The exit code: 0, or 2 and one line where it cannot be done."""
    try:
        importlib.import_module("nanovllm")  # refuses a bad NANOVLLM_LOG_LEVEL
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    from jobs.command import complain
    from jobs.simulation.command import run
    from jobs.usage import UsageError

    try:
        return run(words)
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
