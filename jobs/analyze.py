"""Explains a run, a sweep, or asks its records in SQL: python -m jobs.analyze run=outputs/2026-11-24/..."""

import sys

from jobs.analysis.program import main

if __name__ == "__main__":
    sys.exit(main("analyze"))
