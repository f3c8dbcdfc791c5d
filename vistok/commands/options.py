"""Command-line options, configurations and records from the fields of one dataclass."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
_SAME = object()


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings of a field beside its `typer.Option`, in `Annotated`.

    `text` is the type on the command line, which `parse` converts to the field's value; `default` is the
    command line's where it is not the field's. `recorded` fields are part of a record's protocol when they
    are given, and `loose` ones may change when a killed run continues.
    """

    text: Any = None
    parse: Callable[[Any], Any] | None = None
    default: Any = _SAME
    recorded: bool = False
    loose: bool = False


def with_options(config: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator for a command `f(config, …)`: the fields of the dataclass `config` become its options, before
    the other parameters, and the command is called with one instance. Fields that are dataclasses themselves
    give the options of their own fields."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        fields = _parameters(config)

        @wraps(command)
        def run(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name, *_ in fields}
            command(_build(config, values), **arguments)

        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for name, kind, default in fields
        ] + [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def recorded(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are part of a record's protocol, where they are given."""
    values = {name: getattr(config, name) for name, setting in _settings(config) if setting.recorded}
    return {name: value for name, value in values.items() if value is not None}


def binding(config: Any) -> dict[str, Any]:
    """The fields of a configuration that must be the same when a killed run continues."""
    loose = {name for name, setting in _settings(config) if setting.loose}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in loose}


def _settings(config: Any) -> list[tuple[str, Setting]]:
    return [(field.name, _setting(hint)) for field, _, hint in _fields(type(config))]


def _setting(hint: Any) -> Setting:
    return next((each for each in get_args(hint)[1:] if isinstance(each, Setting)), Setting())


def _parameters(config: type[Any]) -> list[tuple[str, Any, Any]]:
    """Name, annotation and default of every option."""
    parameters = []
    for field, kind, hint in _fields(config):
        if dataclasses.is_dataclass(kind):
            parameters += _parameters(kind)
            continue
        setting = _setting(hint)
        option = next(each for each in get_args(hint)[1:] if not isinstance(each, Setting))
        default = field.default if setting.default is _SAME else setting.default
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        annotation = setting.text or _option_type(kind)
        if isinstance(default, tuple):
            default = list(default)
        parameters.append((field.name, Annotated[annotation, option], default))
    return parameters


def _fields(config: type[Any]) -> list[tuple[Any, Any, Any]]:
    hints = get_type_hints(config, include_extras=True)
    rows = []
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        rows.append((field, kind, hint))
    return rows


def _option_type(kind: Any) -> Any:
    """The type as typer reads it: repeated options are lists."""
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]]
    parts = get_args(kind)
    repeated = next((part for part in parts if get_origin(part) is tuple), None)
    return kind if repeated is None else list[get_args(repeated)[0]] | None


def _build(config: type[T], values: dict[str, Any]) -> T:
    made = {}
    for field, kind, hint in _fields(config):
        if dataclasses.is_dataclass(kind):
            made[field.name] = _build(kind, values)
            continue
        setting, value = _setting(hint), values[field.name]
        if setting.parse is not None:
            value = setting.parse(value)
        elif isinstance(value, list):
            value = tuple(value) if value or get_origin(kind) is tuple else None
        made[field.name] = value
    return config(**made)
