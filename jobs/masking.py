"""Keeps tokens and secrets out of everything that a run writes down."""

import itertools
import re
from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

MASK = "***"
MIN_SECRET_LENGTH = 8
"""Environment values shorter than this are left alone: replacing "1" everywhere would help nobody."""

_SECRET_WORDS = {"token", "secret", "password", "passwd", "credential", "credentials", "apikey", "bearer", "auth"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key")}
_SECRET_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")


def smells_of_secret(key: str) -> bool:
    """Whether a key's last part names a secret: HF_TOKEN, model.api_key; not max_tokens or stop_token_ids."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.rsplit(".", 1)[-1])
    words = re.split(r"[^a-z0-9]+", spaced.lower())
    return words[-1] in _SECRET_WORDS or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words))


class Masker:
    """Replaces secrets by ***, in text, overrides and configurations.

    A secret is: the value of a key that smells of one (`smells_of_secret`); a config value that comes from
    `${oc.env:...}`, directly or through another key; text shaped like a well-known token or like the password in a
    URL; and the value of any environment variable whose name smells of a secret, wherever it turns up.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {v for k, v in environment.items() if smells_of_secret(k) and len(v) >= MIN_SECRET_LENGTH}
        self._values = sorted(values, key=len, reverse=True)

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, MASK)
        return _SECRET_SHAPES.sub(MASK, text)

    def argument(self, argument: str) -> str:
        """One word of a command line; overrides keep their key."""
        key, equals, value = argument.partition("=")
        if equals and (smells_of_secret(key.lstrip("+~")) or _FROM_ENVIRONMENT.search(value)):
            return f"{key}={MASK}"
        return self.text(argument)

    def unresolved(self, config: DictConfig) -> DictConfig:
        """A copy with its interpolations as they were written, except those that read the environment."""
        plain = self._plain(OmegaConf.to_container(config, resolve=False), "")
        return cast(DictConfig, OmegaConf.create(plain))

    def resolved(self, config: DictConfig) -> dict[str, Any]:
        """Plain values with every interpolation resolved; one that reached an `oc.env` resolves to the mask."""
        masked = self.unresolved(config)
        OmegaConf.copy_cache(from_config=config, to_config=masked)
        return self._resolved(masked)

    def _plain(self, node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {k: self._plain(v, str(k)) for k, v in node.items()}
        if isinstance(node, list):
            return [self._plain(v, key) for v in node]
        if node is not None and smells_of_secret(key):
            return MASK
        if isinstance(node, str):
            return MASK if _FROM_ENVIRONMENT.search(node) else self.text(node)
        return node

    def _resolved(self, node: Any) -> Any:
        if isinstance(node, DictConfig):
            return {str(k): self._resolved(_value(node, k)) for k in node}
        if OmegaConf.is_list(node):
            return [self._resolved(_value(node, i)) for i in range(len(node))]
        return node


def _value(node: Any, key: Any) -> Any:
    """A child's value; MASK where resolving fails because what it depends on has been masked."""
    if OmegaConf.is_missing(node, key):
        return "???"
    try:
        return node[key]
    except OmegaConfBaseException:
        return MASK
