"""The words of a command line: Hydra's flags, and the overrides."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jobs.text_values import as_text
from jobs.usage import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """What was typed after `python -m jobs.generate`."""

    words: list[str]
    """All of it, as it was typed."""
    overrides: list[str]
    """As Hydra can read them; see as_text."""
    multirun: bool
    shows: str | None
    """The flag that asks to show something instead of running: --help, --cfg, ..."""
    resolves: bool
    """--resolve: what is shown must be a configuration that can run."""
    config_name: str | None
    config_dir: Path | None

    @property
    def config_flags(self) -> list[str]:
        """The flags that another process needs to find the same configuration."""
        name = [] if self.config_name is None else ["--config-name", self.config_name]
        return name if self.config_dir is None else [*name, "--config-dir", str(self.config_dir)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See --hydra-help for all flags")


_SHOWING = {
    "--help": ("-h",),
    "--hydra-help": (),
    "--version": (),
    "--shell-completion": ("-sc",),
}


def parse(words: Sequence[str]) -> CommandLine:
    """Reads Hydra's own flags, wherever they stand; UsageError for a flag that does not exist."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag, short in _SHOWING.items():
        parser.add_argument(flag, *short, dest="shows", action="append_const", const=flag)
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--run", "-r", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("overrides", nargs="*")
    found = parser.parse_intermixed_args(list(words))
    shows = [*(found.shows or []), *(["--cfg"] if found.cfg else []), *(["--info"] if found.info else [])]
    modes = [*shows, *(["--multirun"] if found.multirun else []), *(["--run"] if found.run else [])]
    if len(modes) > 1:
        raise UsageError(f"{' '.join(modes)}: only one of these can be used at a time")
    if (found.package or found.resolve) and not {"--cfg", "--help"} & set(shows):
        raise UsageError("--package and --resolve go with --cfg")
    return CommandLine(
        words=list(words),
        overrides=[as_text(word) for word in found.overrides],
        multirun=found.multirun,
        shows=shows[0] if shows else None,
        resolves=found.resolve,
        config_name=found.config_name,
        config_dir=None if found.config_dir is None else found.config_dir.absolute(),
    )
