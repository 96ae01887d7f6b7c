"""What a run's directory is called after: the choice of a model, or the model that was put in its place."""

import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf


def model_name(choice: str, path: str, config_dirs: Sequence[Path]) -> str:
    """`choice` where `path` is what its file in `model/` says; else the last part of `path`.

    Not yet made safe as a file name. `config_dirs`: those of the configuration, the first that has the file counts.
    """
    files = (directory / "model" / f"{choice}.yaml" for directory in config_dirs)
    file = next((file for file in files if file.is_file()), None)
    if file is not None and OmegaConf.select(OmegaConf.load(file), "path") == path:
        return choice
    return os.path.basename(os.path.abspath(path)) or choice
