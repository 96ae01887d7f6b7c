"""The error of a user who can cure it."""


class UsageError(ValueError):
    """What was asked for cannot be done; the message names the key, the value and what is allowed. Exit code 2."""
