"""Writes a run as a trace for the Perfetto viewer: python -m jobs.trace run=outputs/2026-11-24/..."""

import sys

from jobs.analysis.program import main

if __name__ == "__main__":
    sys.exit(main("trace"))
