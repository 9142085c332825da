"""From YAML and command line to typed settings: every mistake at once, each with its path and what was meant."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from distkd import methods
from distkd.errors import ConfigError
from distkd.files import raise_disk_fault
from distkd.train.settings import Settings

__all__ = ["load", "parse_overrides", "schema"]


PATHS = ("run.root", "teacher.export", "data.shards", "data.scratch", "data.stream.cache")
"""Keys whose values may begin with `~`."""


def load(
    path: Path, overrides: Mapping[str, Any] | None = None, *, fold: int | None = None, seed: int | None = None
) -> Settings:
    """The settings of a config file, with overrides by dotted key.

    `{fold}` and `{seed}` in `run.name` and `teacher.export` are replaced by the run's own. Where `fold` or `seed` is
    given, as in a study over several, both names get it as a suffix unless they place it themselves.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    raw = _read_yaml(path)
    run = raw.setdefault("run", {})
    if isinstance(run, dict):
        cast(dict[str, Any], run).setdefault("name", default_name(path))
    if isinstance(raw.get("method"), str):
        raw["method"] = {"name": raw["method"]}
    for key, value in (overrides or {}).items():
        _put(raw, key, value)
    sweep = {"fold": fold, "seed": seed}
    for key, name in (("data.fold", "fold"), ("run.seed", "seed")):
        if sweep[name] is not None:
            _put(raw, key, sweep[name])
    _expand(raw)
    settings = _validate(raw, str(path))
    suffix = {name: number for name, number in sweep.items() if number is not None}
    place = {"fold": settings.data.fold, "seed": settings.run.seed}
    return settings.model_copy(
        update={
            "run": settings.run.model_copy(update={"name": _fill("run.name", settings.run.name, place, suffix)}),
            "teacher": settings.teacher.model_copy(update={"export": _teacher(settings.teacher.export, place, suffix)}),
        }
    )


def _expand(raw: Mapping[str, Any]) -> None:
    """Put the home folder for a leading `~` of a path: a shell leaves one alone that is quoted, or in a file."""
    for key in PATHS:
        *sections, last = key.split(".")
        here: Any = raw
        for section in sections:
            here = cast(dict[str, Any], here).get(section) if isinstance(here, dict) else None
        value: Any = cast(dict[str, Any], here).get(last) if isinstance(here, dict) else None
        if isinstance(value, str) and value.startswith("~"):
            here[last] = os.path.expanduser(value)
            if here[last] == value:
                raise ConfigError(f"{key}: {value!r} names no home folder that is known here; write the whole path")


def _teacher(export: str | None, place: Mapping[str, int], suffix: Mapping[str, int]) -> str | None:
    if export is None:
        return None
    is_name = len(Path(export).parts) == 1  # a bare run name is one of the study; a path means what it says
    return _fill("teacher.export", export, place, suffix if is_name else {})


def default_name(path: Path) -> str:
    """`configs/tiny/teacher.yaml` is run `tiny-teacher`; a run folder's own config.yaml keeps the folder's name."""
    parts = [path.resolve().parent.name, path.stem]
    return "-".join(part for part in parts if part and part != "configs")


def _fill(key: str, text: str, place: Mapping[str, int], suffix: Mapping[str, int]) -> str:
    text += "".join(f"-{name}{{{name}}}" for name in suffix if f"{{{name}}}" not in text)
    for name, value in place.items():
        text = text.replace("{" + name + "}", str(value))
    unknown = re.search(r"\{(\w*)\}", text)
    if unknown:
        raise ConfigError(f"{key}: unknown placeholder {unknown[0]!r}; available: {{fold}}, {{seed}}")
    return text


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with three traps closed: equal keys, of which the last would win in silence; keys such as `on` that are
    read as booleans; and 1e-4, which would be text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]  # before a merge (<<) puts others in front, which may be overridden
        line = f"line {node.start_mark.line + 1}"
        mapping = super().construct_mapping(node, deep)
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} stands twice in one section - {line}; remove one")
        for key in mapping:
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} is no text - in the section of {line}; put it in quotes")
        return mapping


_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a file; an empty one counts as absent."""
    try:
        raw: Any = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise_disk_fault(f"config {path}", error)
        raise ConfigError(f"config {path} cannot be read: {error.strerror}; name a YAML file") from error
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"config {path} holds {found}, expected sections such as method, model and data")
    return {name: section for name, section in cast(dict[str, Any], raw).items() if section is not None}


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    here = raw
    for section in sections:
        below = here.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--{key}: {section!r} is the value {below!r} in the config, not a section")
        here = cast(dict[str, Any], below)
    here[last] = value


def parse_overrides(arguments: Sequence[str], advice: Callable[[str], str] = lambda _: "") -> dict[str, Any]:
    """`--section.field VALUE` or `--section.field=VALUE` pairs as a dictionary; values are read as YAML.

    Args:
        advice: what to do about a word that is no such pair, or nothing.

    Raises:
        ConfigError: a word that is no such pair.
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not re.fullmatch(r"\w+(\.\w+)+", key):
            known = advice(word)
            raise ConfigError(
                f"cannot read argument {word!r}: {known}"
                if known
                else f"cannot read argument {word!r}; overrides are --section.field VALUE, see --help"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE; an empty one is --{key}=")
            text = rest.pop(0)
        try:
            found[key] = yaml.load(text, _Loader)
        except (yaml.YAMLError, ConfigError) as error:
            raise ConfigError(f"--{key}: cannot read {text!r} as YAML; quote it") from error
    return found


@cache
def settings_class(method: str) -> type[Settings]:
    """`Settings` whose `method` section is that of one method; one class each, so that equal settings compare equal."""
    return create_model("Settings", __base__=Settings, method=(methods.config_class(method), ...))


def _validate(raw: dict[str, Any], where: str) -> Settings:
    section: Any = raw.get("method", {})
    name: Any = cast(dict[str, Any], section).get("name") if isinstance(section, dict) else section
    problems: list[str] = []
    kind = Settings
    if isinstance(name, str):
        try:
            kind = settings_class(name)
        except ConfigError as error:
            problems.append(f"method.name: {error}")
    else:
        fault = "missing" if name is None else f"input should be a valid string, found {name!r}"
        problems.append(f"method.name: {fault}; available: {', '.join(methods.available())}")
    if problems:
        raw = {**raw, "method": {"name": ""}}  # so that the other sections are looked at all the same
    settings: Settings | None = None
    try:
        settings = kind.model_validate(_marked(raw, kind))
    except ValidationError as error:
        problems += _described(error.errors(), raw, kind)
    if problems or settings is None:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ConfigError(f"config {where} has {count}:\n" + "\n".join(f"  {line}" for line in problems))
    return settings


class _Misread:
    """A boolean where none is meant: numbers would take yes, no, on and off of YAML for 1 and 0."""

    def __init__(self, value: bool):
        self.value = value

    def __repr__(self) -> str:
        return f"{self.value} (a bare yes, no, on or off is a boolean in YAML)"


def _marked(value: Any, annotation: Any) -> Any:
    """The value with misread booleans marked, which no type accepts."""
    kinds = _parts(annotation)
    if isinstance(value, bool):
        if not value and any("off" in typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal):
            return "off"  # one of the words that are meant here
        return value if bool in kinds or Any in kinds else _Misread(value)
    if isinstance(value, list):
        return [_marked(item, None) for item in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    section = _section(annotation)
    items: Any = next((typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict), Any)
    return {
        name: _marked(item, getattr(section.model_fields.get(name), "annotation", Any) if section else items)
        for name, item in cast(dict[str, Any], value).items()
    }


def _parts(annotation: Any) -> list[Any]:
    """The types that a union or an annotated type is made of, or the type itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [part for item in typing.get_args(annotation) for part in _parts(item)]
    if typing.get_origin(annotation) is Annotated:
        return _parts(typing.get_args(annotation)[0])
    return [annotation]


def _described(errors: Sequence[ErrorDetails], raw: Mapping[str, Any], root: type[BaseModel]) -> list[str]:
    """One line per path; what fits no part of a union is one mistake."""
    faults: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for error in errors:
        location = _location(error["loc"], raw, missing=error["type"] == "missing")
        path = ".".join(map(str, location))
        if error["type"] == "extra_forbidden":
            fault = f"unknown key{_suggest(str(location[-1]), location[:-1], root)}"
        elif error["type"] == "missing":
            fault = "missing"
        else:
            message = error["msg"].removeprefix("Value error, ").replace(" for <class 'pathlib.Path'>", "")
            fault = message[0].lower() + message[1:]
            if not (error["type"] == "value_error" and isinstance(error["input"], Mapping)):  # of a whole section
                found[path] = f", found {error['input']!r}"
        faults.setdefault(path, []).append(fault)
    return [f"{path}{': ' if path else ''}{'; or '.join(some)}{found.get(path, '')}" for path, some in faults.items()]


def _location(loc: Sequence[int | str], raw: Any, *, missing: bool) -> list[int | str]:
    """The keys that the config has; pydantic also names the parts of unions and functions."""
    here: Any = raw
    location: list[int | str] = []
    for number, part in enumerate(loc):
        if isinstance(here, dict) and part in here:
            here = cast(dict[Any, Any], here)[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(cast(list[Any], here)):
            here = cast(list[Any], here)[part]
        elif not (missing and number == len(loc) - 1):
            continue
        location.append(part)
    return location


def _suggest(key: str, parents: Sequence[int | str], root: type[BaseModel]) -> str:
    section: type[BaseModel] | None = root
    for name in parents:
        section = (
            _section(section.model_fields[str(name)].annotation)
            if section and str(name) in section.model_fields
            else None
        )
    if section is None:
        return ""
    close = difflib.get_close_matches(key, section.model_fields, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    elsewhere = [
        f"{name}.{key}"
        for name, info in root.model_fields.items()
        if (below := _section(info.annotation)) is not None and key in below.model_fields
    ]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known here: {', '.join(section.model_fields)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation means, if it does."""
    return next((kind for kind in _parts(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def schema() -> dict[str, Any]:
    """JSON schema of a config file for editors, with the sections of every method."""
    kinds = [methods.config_class(name) for name in methods.available()]
    union: Any = Annotated[Union[tuple(kinds)], Field(discriminator="name")]  # noqa: UP007
    return create_model("Config", __base__=Settings, method=(union, ...)).model_json_schema()
