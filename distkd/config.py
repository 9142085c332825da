"""From YAML and command line to typed settings: every mistake at once, each with its path and what was meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from distkd import methods
from distkd.errors import ConfigError
from distkd.train.settings import Settings

__all__ = ["load", "parse_overrides", "schema"]


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
    raw.setdefault("run", {})
    if isinstance(raw["run"], dict):
        raw["run"].setdefault("name", default_name(path))
    for key, value in (overrides or {}).items():
        _put(raw, key, value)
    sweep = {"fold": fold, "seed": seed}
    for key, name in (("data.fold", "fold"), ("run.seed", "seed")):
        if sweep[name] is not None:
            _put(raw, key, sweep[name])
    settings = _validate(raw, str(path))
    suffix = {name: number for name, number in sweep.items() if number is not None}
    place = {"fold": settings.data.fold, "seed": settings.run.seed}
    return settings.model_copy(
        update={
            "run": settings.run.model_copy(update={"name": _fill(settings.run.name, place, suffix)}),
            "teacher": settings.teacher.model_copy(update={"export": _fill(settings.teacher.export, place, suffix)}),
        }
    )


def default_name(path: Path) -> str:
    """`configs/tiny/teacher.yaml` is run `tiny-teacher`; a run folder's own config.yaml keeps the folder's name."""
    parts = [path.resolve().parent.name, path.stem]
    return "-".join(part for part in parts if part and part != "configs")


def _fill(text: str | None, place: Mapping[str, int], suffix: Mapping[str, int]) -> str | None:
    if text is None:
        return None
    if len(Path(text).parts) == 1:  # a bare run name; a path means what it says
        text += "".join(f"-{name}{{{name}}}" for name in suffix if f"{{{name}}}" not in text)
    for name, value in place.items():
        text = text.replace("{" + name + "}", str(value))
    return text


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the second of two equal keys win in silence; a config must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(
                    f"key {key!r} stands twice in one section - line {node.start_mark.line + 1}; remove one"
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path} holds {type(raw).__name__}, expected sections such as method, model and data")
    return raw


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    here = raw
    for section in sections:
        below = here.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--{key}: {section!r} is a value in the config, not a section")
        here = below
    here[last] = value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.field VALUE` or `--section.field=VALUE` pairs as a dictionary; values are read as YAML.

    Raises:
        ConfigError: a word that is no such pair.
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            raise ConfigError(f"cannot read argument {word!r}; overrides are --section.field VALUE, see --help")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: cannot read {text!r} as YAML; quote it") from error
    return found


def settings_class(method: str) -> type[Settings]:
    """`Settings` whose `method` section is that of one method."""
    return create_model("Settings", __base__=Settings, method=(methods.config_class(method), ...))


def _validate(raw: dict[str, Any], where: str) -> Settings:
    section = raw.get("method")
    if isinstance(section, str):
        raw["method"] = section = {"name": section}
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ConfigError(f"config {where}: method.name is missing; available: {', '.join(methods.available())}")
    problems: list[str] = []
    try:
        kind = settings_class(section["name"])
    except ConfigError as error:
        problems.append(f"method.name: {error}")
        kind = Settings
        raw["method"] = {"name": section["name"]}
    try:
        settings = kind.model_validate(raw)
    except ValidationError as error:
        problems += [_describe(item, kind) for item in error.errors()]
        settings = None
    if problems or settings is None:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ConfigError(f"config {where} has {count}:\n" + "\n".join(f"  {line}" for line in problems))
    return settings


def _describe(error: ErrorDetails, root: type[BaseModel]) -> str:
    location = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    path = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggest(str(location[-1]), location[:-1], root)}"
    if error["type"] == "missing":
        return f"{path}: missing"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{path}: {message.removeprefix('value error, ')}, found {error['input']!r}"


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
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for item in typing.get_args(annotation) if (found := _section(item)) is not None), None)
    return None


def schema() -> dict[str, Any]:
    """JSON schema of a config file for editors, with the sections of every method."""
    kinds = [methods.config_class(name) for name in methods.available()]
    union = Annotated[Union[tuple(kinds)], Field(discriminator="name")]  # noqa: UP007
    return create_model("Config", __base__=Settings, method=(union, ...)).model_json_schema()
