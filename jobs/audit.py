"""Replays a run's records and names the first violation: python -m jobs.audit run=outputs/2026-11-24/..."""

import sys

from jobs.analysis.program import main

if __name__ == "__main__":
    sys.exit(main("audit"))
