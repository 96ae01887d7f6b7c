"""From overrides to a validated dataclass, through Hydra's Compose API; every complaint is one UsageError."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from jobs import complaints
from jobs import schema as schemas
from jobs.model_name import model_name
from jobs.usage import UsageError

HYDRA_VERSION_BASE = "1.3"
HYDRAS_OWN = ("hydra._internal.core_plugins.", "hydra_plugins.")
"""The `_target_` of its launchers and sweepers, which stand in every configuration."""
RUN_DIR, SWEEP_DIR = "hydra.run.dir", "hydra.sweep.dir"

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSource(Generic[ConfigT]):
    """Where a command's configuration comes from."""

    schema: type[ConfigT]
    config_dir: Path
    """Absolute directory of the YAML files."""
    config_name: str
    """The primary file; its defaults list begins with `<config_name>_schema`."""
    extra_dir: Path | None = None
    """--config-dir: more groups and choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition(Generic[ConfigT]):
    """A configuration in both of its forms, and where its run goes."""

    config: ConfigT
    tree: DictConfig
    """What `config` was built from, interpolations unresolved."""
    hydra: DictConfig
    """Hydra's own node: overrides, choices, search path."""
    run_dir: Path
    run_dir_chosen: bool
    """Whether the command line named the directory, rather than a pattern in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What `-m` was asked for, before it is taken apart into jobs."""

    overrides: list[Override]
    """Sweeps that a file asks for (hydra.sweeper.params) first, then the command line's; without Hydra's own."""
    sweep_dir: Path
    sweep_dir_chosen: bool


def register(source: ConfigSource[ConfigT]) -> None:
    """Makes the schema known to Hydra under the name that the primary file's defaults list uses."""
    node = OmegaConf.structured(source.schema)
    _thaw(node)
    ConfigStore.instance().store(name=f"{source.config_name}_schema", node=node)


def compose_config(source: ConfigSource[ConfigT], overrides: Sequence[str]) -> Composition[ConfigT]:
    """The configuration that these overrides make; UsageError names the key, the value and what is allowed."""
    with _hydra(source):
        parsed = _parse(overrides)
        _check_hydra_keys(parsed, {RUN_DIR})
        full = _compose(source, overrides, parsed)
        tree = _checked_tree(full, source, parsed)
        with _resolvers(full, source):
            return Composition(
                config=_build(tree, source, parsed),
                tree=tree,
                hydra=full.hydra.copy(),
                run_dir=_directory(full, RUN_DIR),
                run_dir_chosen=complaints.setter(RUN_DIR, parsed) is not None,
            )


def check_composition(source: ConfigSource[ConfigT], overrides: Sequence[str]) -> None:
    """Raises UsageError where Hydra would refuse these overrides; values out of range pass."""
    with _hydra(source):
        parsed = _parse(overrides)
        _checked_tree(_compose(source, overrides, parsed), source, parsed)


def given_value(source: ConfigSource[ConfigT], overrides: Sequence[str], key: str) -> str | None:
    """What these overrides set a key to, as text; None without one, for null, and for what can be no single value."""
    with _hydra(source):
        override = complaints.setter(key, _parse(overrides))
    if override is None or override.key_or_group != key or override.is_sweep_override():
        return None
    value = override.value()
    return None if value is None else str(value)


def merge_overrides(source: ConfigSource[ConfigT], overrides: Sequence[str], *, without: str) -> list[str]:
    """Of several overrides for one key or group the last; without those of the key `without` and of Hydra's own."""
    by_key: dict[str, str] = {}
    with _hydra(source):
        for override in _parse(overrides):
            if not override.is_hydra_override() and override.key_or_group != without:
                by_key.pop(override.key_or_group, None)
                by_key[override.key_or_group] = str(override.input_line)
    return list(by_key.values())


def plan_sweep(source: ConfigSource[ConfigT], overrides: Sequence[str]) -> SweepPlan:
    """Reads the overrides of a sweep; what they sweep over is not composed yet."""
    with _hydra(source):
        parsed = _parse(overrides)
        _check_hydra_keys(parsed, {SWEEP_DIR})
        steady = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        full = _compose(source, steady, [o for o in parsed if not o.is_sweep_override()])
        params = OmegaConf.select(full, "hydra.sweeper.params") or {}
        with _resolvers(full, source):
            return SweepPlan(
                overrides=[
                    *_parse([f"{key}={value}" for key, value in params.items()]),
                    *(o for o in parsed if not o.is_hydra_override()),
                ],
                sweep_dir=_directory(full, SWEEP_DIR),
                sweep_dir_chosen=complaints.setter(SWEEP_DIR, parsed) is not None,
            )


@contextmanager
def _hydra(source: ConfigSource[ConfigT]) -> Iterator[None]:
    """Hydra, initialised for this source; the process-wide state that it keeps is put back afterwards."""
    directories = [d for d in (source.config_dir, source.extra_dir) if d is not None]
    for directory in directories:
        if not directory.is_dir():
            raise UsageError(f"{directory}: no such configuration directory (conf/ is part of a source checkout)")
    if not any((d / f"{source.config_name}.yaml").is_file() for d in directories):
        raise UsageError(f"{source.config_name}: no such configuration in {' or '.join(map(str, directories))}")
    register(source)
    with initialize_config_dir(str(source.config_dir), job_name=source.config_name, version_base=HYDRA_VERSION_BASE):
        yield


@contextmanager
def _resolvers(full: DictConfig, source: ConfigSource[ConfigT]) -> Iterator[None]:
    """Gives ${hydra:...} its values for a while, and ${model_name:CHOICE,PATH} a meaning (see model_name)."""
    directories = [d for d in (source.config_dir, source.extra_dir) if d is not None]
    OmegaConf.register_new_resolver("model_name", partial(model_name, config_dirs=directories), replace=True)
    holder = HydraConfig.instance()
    before = holder.cfg
    holder.set_config(full)
    try:
        yield
    finally:
        holder.cfg = before
        OmegaConf.clear_resolver("model_name")


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            raise UsageError(complaints.bad_syntax(text, str(error))) from error
        if not parsed[-1].key_or_group:
            raise UsageError(f"{complaints.shown(text)}: not an override; write key=value")
    return parsed


def _check_hydra_keys(parsed: Sequence[Override], honoured: set[str]) -> None:
    """Refuses keys of Hydra's own that would have no effect here, instead of ignoring them."""
    cures = {
        "hydra.verbose": "for more log lines: log_level=DEBUG",
        "hydra.mode": "for a sweep: -m",
        "hydra.searchpath": "for more configuration files: --config-dir DIR",
        RUN_DIR: f"a sweep makes one directory per job below {SWEEP_DIR}",
        SWEEP_DIR: f"it belongs to a sweep (-m); the directory of a single run is {RUN_DIR}",
    }
    for override in parsed:
        if override.is_hydra_override() and (override.key_or_group not in honoured or override.is_sweep_override()):
            cure = cures.get(override.key_or_group, f"of Hydra's own keys it uses {', '.join(sorted(honoured))} alone")
            raise UsageError(f"{complaints.shown(override)}: has no effect in this command; {cure}")


def _compose(source: ConfigSource[ConfigT], overrides: Sequence[str], parsed: Sequence[Override]) -> DictConfig:
    _check_choices(parsed)
    extra = [] if source.extra_dir is None else [_search_path(source.extra_dir)]
    try:
        return compose(source.config_name, [*overrides, *extra], return_hydra_config=True)
    except MissingConfigException as error:
        raise UsageError(complaints.bad_choice(error, parsed)) from error
    except Exception as error:  # Hydra lets YAML's errors and ValueErrors of its own through as they are
        raise UsageError(complaints.bad_composition(error, source.schema, parsed, _groups())) from error


def _search_path(directory: Path) -> str:
    return f"hydra.searchpath=[{complaints.quoted(f'file://{directory.absolute()}')}]"


def _groups() -> list[str]:
    """The top-level groups, those without a dataclass (experiment, debug) included."""
    return [name for name in GlobalHydra.instance().config_loader().list_groups("") if name != "hydra"]


def _check_choices(parsed: Sequence[Override]) -> None:
    """Refuses what Hydra would take or refuse without saying what is allowed: ~group, group=null, group=true."""
    loader = GlobalHydra.instance().config_loader()
    for override in parsed:
        if override.is_delete():
            raise UsageError(f"{complaints.shown(override)}: nothing can be deleted; set another value or choice")
        if override.is_hydra_override() or override.is_sweep_override() or "." in override.key_or_group:
            continue
        options = loader.get_group_options(override.key_or_group)
        if options and not isinstance(override.value(), str | list | dict):
            raise UsageError(f"{complaints.shown(override)}: must be one of {', '.join(options)}")


def _checked_tree(full: DictConfig, source: ConfigSource[ConfigT], parsed: Sequence[Override]) -> DictConfig:
    """The command's own configuration, without Hydra's, holding only keys that the schema has."""
    _refuse_targets(OmegaConf.to_container(full, resolve=False), "")
    tree = full.copy()
    with open_dict(tree):
        del tree["hydra"]
    known = schemas.keys(source.schema)
    for key in _tree_keys(tree, known):
        if key not in known:  # +key=value puts it beside the dataclass's fields
            override = complaints.setter(key, parsed)
            name = complaints.shown(override) if override else key
            raise UsageError(f"{name}: {complaints.unknown_key(key, source.schema, _groups())}")
    return tree


def _refuse_targets(node: object, key: str) -> None:
    """A configuration may be a stranger's, and `_target_` names code to run: none is, and none is even taken."""
    if isinstance(node, list):
        for index, child in enumerate(node):
            _refuse_targets(child, f"{key}[{index}]")
    if not isinstance(node, dict):
        return
    for name, child in node.items():
        where = f"{key}.{name}" if key else str(name)
        if name == "_target_" and not str(child).startswith(HYDRAS_OWN):
            raise UsageError(f"{where}={child}: no code is run from a configuration; leave _target_ out")
        _refuse_targets(child, where)


def _tree_keys(tree: DictConfig, known: dict[str, object], prefix: str = "") -> Iterator[str]:
    """Dotted keys, down to the first unknown one of each branch."""
    for name in tree:
        key = f"{prefix}{name}"
        yield key
        child = tree._get_node(str(name))
        if not is_dataclass(known.get(key)):  # nor is a mapping one, whose names are anyone's
            continue
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_interpolation()):
            yield from _tree_keys(child, known, f"{key}.")


def _build(tree: DictConfig, source: ConfigSource[ConfigT], parsed: Sequence[Override]) -> ConfigT:
    try:
        _check_nothing_missing(tree)
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UsageError(complaints.bad_interpolation(error, parsed)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not isinstance(config, source.schema):
        raise TypeError(f"the defaults list of {source.config_name}.yaml lacks {source.config_name}_schema")
    return cast(ConfigT, config)


def _check_nothing_missing(tree: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        group = missing[0].rpartition(".")[0]
        choose = f" or choose a file of its group: {group}=NAME" if group else ""
        raise UsageError(f"{missing[0]}=???: has no value. Set it: {missing[0]}=VALUE{choose}")


def _directory(full: DictConfig, key: str) -> Path:
    try:
        return Path(os.path.abspath(str(OmegaConf.select(full, key, throw_on_missing=True))))
    except OmegaConfBaseException as error:
        raise UsageError(f"{key}: {str(error).splitlines()[0]}") from error


def _thaw(node: DictConfig) -> None:
    """Frozen in code, open while composing: OmegaConf makes the nodes of frozen dataclasses read-only.

    A mapping takes any name, with or without + before it.
    """
    OmegaConf.set_readonly(node, None)
    if not is_dataclass(OmegaConf.get_type(node)):
        OmegaConf.set_struct(node, False)
    for key in node:
        child = node._get_node(str(key))
        if isinstance(child, DictConfig):
            _thaw(child)
