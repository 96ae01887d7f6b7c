"""Tells the life of one row of a run: python -m jobs.explain run=outputs/2026-11-24/... row=812"""

import sys

from jobs.analysis.program import main

if __name__ == "__main__":
    sys.exit(main("explain"))
