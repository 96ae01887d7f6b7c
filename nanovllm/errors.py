"""Errors that users can cure; the message says how."""


class PromptError(ValueError):
    """One prompt that cannot be served, with a stable code for scripts."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class SettingError(ValueError):
    """A setting that this machine or this model cannot serve, found only when it was tried."""


class ModelError(ValueError):
    """A model directory, hub id or checkpoint that cannot be used."""
