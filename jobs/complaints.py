"""Hydra's and OmegaConf's errors as one message each, naming the key, the value and what is allowed."""

import os
import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from jobs import schema as schemas
from jobs.masking import Masker


def shown(override: Override | str) -> str:
    """The override as it was typed, secrets masked."""
    text = override if isinstance(override, str) else override.input_line or override.key_or_group
    return Masker(os.environ).argument(text)


def quoted(text: str) -> str:
    """The text as an override's value that Hydra reads back unchanged, interpolations included as plain text."""
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text=literal, quote=Quote.double).with_quotes()


def bad_syntax(text: str, complaint: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"{shown(text)}: not an override; write key=value (flags such as -m begin with a dash)"
    reason = " ".join(
        line for line in complaint.split("\nSee http")[0].splitlines() if text not in line and line.strip() != "^"
    )
    cure = shlex.quote(shown(f"{key}={QuotedString(text=value.strip(chr(34)), quote=Quote.double).with_quotes()}"))
    return (
        f"{shown(text)}: Hydra cannot read this value{f' ({reason})' if reason else ''}. Text that holds more than "
        f"letters, digits and /-_.+ needs quotes of its own, inside quotes for the shell: {cure}"
    )


def bad_choice(error: MissingConfigException, overrides: Sequence[Override]) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if not error.options:
        return one_line(error)
    override = next((o for o in overrides if o.key_or_group == group), None)
    name = shown(override) if override else f"{group}={choice}"
    near = schemas.close_match(choice, error.options)
    return f"{name}: no such choice{near or '.'} There are: {', '.join(error.options)}"


def bad_composition(error: Exception, schema: type, overrides: Sequence[Override], groups: Sequence[str]) -> str:
    sweep = next((o for o in overrides if o.is_sweep_override()), None)
    if sweep is not None:
        return _several_values(sweep)
    again = re.match(r"Multiple values for (\S+)\.", str(error))
    if again:
        return f"{again[1]}: chosen twice, or added with + though it is there already; write {again[1]}=NAME once"
    # Errors in a file come as the context alone, those of the command line as the cause.
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        in_file = re.match(r"In '([^']+)'", str(error))
        return bad_key(str(cause.full_key), cause, schema, overrides, groups, f"{in_file[1]}.yaml" if in_file else None)
    return one_line(error)


def bad_key(
    key: str,
    cause: Exception,
    schema: type,
    overrides: Sequence[Override],
    groups: Sequence[str],
    file: str | None = None,
) -> str:
    """A key that OmegaConf refuses, from the command line or from a file."""
    override = setter(key, overrides)
    name = f"{key} (in {file})" if file else shown(override) if override else key
    hint = schemas.keys(schema).get(key)
    if hint is not None:
        return f"{name}: must be {schemas.allowed(hint)}"
    if key.split(".")[0] == "hydra":
        return f"{name}: {str(cause).splitlines()[0]}"
    return f"{name}: {unknown_key(override.key_or_group if override and not file else key, schema, groups)}"


def unknown_key(key: str, schema: type, groups: Sequence[str]) -> str:
    """Says that a key does not exist, what it may have been, and which there are beside it."""
    near = schemas.close_match(key, [*schemas.keys(schema), *groups])
    group, siblings = schemas.siblings(key, schema)
    if group:
        return f"no such key{near or '.'} Keys of {group}: {', '.join(siblings)}"
    names = [*siblings, *(name for name in groups if name not in siblings)]
    return f"no such key{near or '.'} Top-level keys and groups: {', '.join(names)}"


def bad_interpolation(error: OmegaConfBaseException, overrides: Sequence[Override]) -> str:
    key = str(error.full_key or "")
    override = setter(key, overrides)
    return f"{shown(override) if override else key}: {str(error).splitlines()[0]}"


def setter(key: str, overrides: Sequence[Override]) -> Override | None:
    """The last override of this key or of one below it."""
    return next((o for o in reversed(overrides) if f"{o.key_or_group}.".startswith(f"{key}.")), None)


def one_line(error: Exception) -> str:
    text = str(error).split("\nConfig search path:")[0]
    return " ".join(text.split()) or type(error).__name__


def _several_values(sweep: Override) -> str:
    if not sweep.is_choice_sweep() or "(" in sweep.get_value_string():
        return f"{shown(sweep)}: a sweep over several values; add -m to run one job for each"
    key, value = sweep.get_key_element(), sweep.get_value_string()
    as_list, as_text = (shlex.quote(shown(f"{key}={form}")) for form in (f"[{value}]", quoted(value)))
    return f"{shown(sweep)}: several values. As a list: {as_list}; as one text: {as_text}; for one job each: add -m"
