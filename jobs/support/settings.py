"""One way to configure every job: a typed model, a YAML file, ``key=value`` on the command line.

pydantic-settings, because its fields carry bounds and a description, nest, and name the field and the value
when refused; tyro reads no YAML, and jsonargparse checks types but not bounds.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

J = TypeVar("J", bound="JobSettings")

_SWITCHES = {f"--{name.replace('_', '-')}": name for name in ("dry_run", "append", "retry_failed", "verify")}


class Group(BaseModel):
    """Settings that belong together and are shared by several jobs; set as ``group.field=value``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class JobSettings(BaseSettings):
    """What every job takes."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    dry_run: bool = False
    """Say what would be done and what it would cost, and do nothing."""

    ray_address: str | None = None
    """Ray cluster to join; unset: the one the job was submitted to, else a local one for this run."""

    run_dir: str | None = None
    """Directory or URL for run.json and what a person looks at; unset: beside the job's output, ending in .run."""

    def directory_for(self, output: str) -> str:
        """Where run.json of a job with this main output lies, and what a person looks at."""
        return self.run_dir or f"{output.rstrip('/')}.run"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Nothing comes from environment variables: a run is what its command line and its file say."""
        return (init_settings,)


def parse(settings: type[J], argv: Sequence[str] | None = None) -> J:
    """The settings of a command line, or exit: 0 after ``--help`` and ``--print-config``, 2 for what is wrong.

    Args:
        settings: The job's settings class; its docstring heads ``--help``.
        argv: ``key=value``, ``group.key=value``, ``--key value``, ``--config FILE``, ``--dry-run``, ``--print-config``.
    """
    words, print_config, config = _normalise(list(sys.argv[1:] if argv is None else argv))
    values = _load_yaml(config) if config else {}
    _refuse_unknown(settings, [*_leaves(values), *(word[2:].split("=")[0] for word in words if word.startswith("--"))])
    try:
        source = CliSettingsSource[Any](
            settings, cli_parse_args=words, cli_prog_name=_prog(settings), cli_implicit_flags=False
        )
        parsed = settings(**merge(values, source()))
    except ValidationError as error:
        _refuse(_explain(error))
    if print_config:
        sys.stdout.write(to_yaml(parsed))
        raise SystemExit(0)
    return parsed


def to_yaml(settings: BaseModel) -> str:
    """The settings as the YAML file that ``--config`` reads."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _normalise(words: list[str]) -> tuple[list[str], bool, str | None]:
    """Bring every accepted spelling to ``--key=value``; split off what is not a setting."""
    print_config, config, rest = False, None, []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        key, equals, value = word.removeprefix("--").partition("=")
        if word == "--print-config":
            print_config = True
        elif word in ("--help", "-h"):
            rest.append("--help")
        elif word in _SWITCHES:
            rest.append(f"--{_SWITCHES[word]}=true")
        elif not equals and word.startswith("--") and position < len(words):
            value = words[position]
            position += 1
            config, rest = (value, rest) if key == "config" else (config, [*rest, f"--{key.replace('-', '_')}={value}"])
        elif not equals:
            _refuse(f"{word!r} is not a setting: write key=value (see --help)")
        elif key == "config":
            config = value
        else:
            rest.append(f"--{key.replace('-', '_')}={value}")
    return rest, print_config, config


def _load_yaml(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        _refuse(f"config={path}: {error.strerror}")
    except yaml.YAMLError as error:
        _refuse(f"config={path} is not YAML: {error}")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        _refuse(f"config={path}: expected keys and values, got a {type(loaded).__name__}")
    return loaded


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names += _fields(annotation, f"{prefix}{name}.")
        names.append(prefix + name)
    return names


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in values.items():
        names += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return names


def _refuse_unknown(settings: type[BaseModel], names: list[str]) -> None:
    known = _fields(settings)
    for name in names:
        if name not in known and name != "help":
            close = difflib.get_close_matches(name, known, n=1)
            _refuse(f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else " (see --help)"))


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """What is in either of two nested mappings; where both say something, the second's word."""
    merged = dict(low)
    for name, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if not name:
            lines.append(problem["msg"].removeprefix("Value error, "))
        elif problem["type"] == "missing":
            lines.append(f"{name} is required and was not given")
        else:
            lines.append(f"{name}={problem['input']!r}: {problem['msg']}")
    return "\n".join(lines)


def _prog(settings: type[BaseModel]) -> str:
    # Run as a program, the module that holds the settings has no name of its own.
    module = settings.__module__
    return f"python -m {f'jobs.{Path(sys.argv[0]).stem}' if module == '__main__' else module}"


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"wrong settings: {message}\n")
    raise SystemExit(2)
