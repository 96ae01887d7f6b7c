"""Compares two runs: python -m jobs.diff a=outputs/2026-11-24/... b=outputs/2026-11-24/..."""

import sys

from jobs.analysis.program import main

if __name__ == "__main__":
    sys.exit(main("diff"))
