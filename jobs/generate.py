"""Answers every row of an input file and records every step: python -m jobs.generate model=qwen3 input=prompts.jsonl"""

import sys

from jobs.program import main

if __name__ == "__main__":
    sys.exit(main("jobs.generate_job"))
