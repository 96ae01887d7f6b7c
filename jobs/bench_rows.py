"""A workload as the input of a generate job: python -m jobs.bench rows workload=nano out=nano.jsonl"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from jobs.summary import show
from jobs.workloads import TOP_ID, WORKLOADS, Sizes, check_workloads

LENGTHS_STEP = 256
"""engine.max_model_len is rounded up to a multiple of it, as the benchmark does."""
DEFAULTS = {"workload": "", "out": "", "seed": "1", "scale": "1", "vocab_size": str(TOP_ID + 1)}


def write_rows(words: Sequence[str]) -> None:
    """Writes the file and shows the job that answers it with the workload's own limits.

    ValueError names a word that cannot be, FileExistsError a file that is there.
    """
    values = _parse(words)
    name, out = values["workload"], Path(values["out"])
    kind = WORKLOADS[name]
    sizes = Sizes(scale=_number("scale", values["scale"]), vocab_size=_integer("vocab_size", values["vocab_size"]))
    load = kind.build(_integer("seed", values["seed"]), sizes)
    with open(out, "x", encoding="utf-8") as file:
        for prompt, length in zip(load.prompts, load.output_lens, strict=True):
            row = {"prompt_token_ids": prompt, "sampling": {"max_tokens": length, "ignore_eos": True}}
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
    longest = -(-kind.longest_len(sizes) // LENGTHS_STEP) * LENGTHS_STEP
    show(
        f"{len(load.prompts):,} rows: {load.num_prompt_tokens:,} tokens in, {load.num_output_tokens:,} out\n"
        f"python -m jobs.generate model=qwen3 model.load_format=dummy input={shlex.quote(str(out))} "
        f"engine.max_num_seqs={kind.max_num_seqs} engine.max_num_batched_tokens={kind.max_num_batched_tokens} "
        f"engine.max_model_len={longest}"
    )


def _parse(words: Sequence[str]) -> dict[str, str]:
    values = dict(DEFAULTS)
    for word in words:
        key, equals, value = word.partition("=")
        if key not in DEFAULTS or not equals or not value:
            raise ValueError(f"{word}: jobs.bench rows takes {', '.join(f'{key}=...' for key in DEFAULTS)}")
        values[key] = value
    check_workloads("workload", [values["workload"]])
    if not values["out"]:
        raise ValueError("out=FILE is missing: the JSONL file to write")
    return values


def _integer(key: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{key}={text}: must be an integer of at least 1")
    return int(text)


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise ValueError(f"{key}={text}: must be above 0 and at most 1")
    return number
