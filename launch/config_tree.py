"""How does a tree of plain values become frozen dataclasses, and come back?

Annotations are the schema. A dataclass takes a mapping with exactly its field names; a number, a
text, a choice is checked against its annotation and never converted by guess. Every refusal names
the full key, what was given and what is allowed: the reader of the message is the person who can
mend it. Nothing here knows Hydra or OmegaConf; `launch/compose.py` hands over plain containers.
"""

import contextlib
import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

_MISSING = "???"
_SCALARS = (bool, int, float, str, Path)
# YAML 1.1 wants a dot and a sign in an exponent, so it reads 3e-4 as text; nothing else passes.
_EXPONENT_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")


class ConfigError(ValueError):
    """A configuration that the user can mend; the message begins with the full key."""


def refuse_targets(value: Any, at: str) -> None:
    """Refuse the key `_target_` anywhere below `at`: naming code in YAML is running code from YAML.

    Raises:
        ConfigError: at the first such key.
    """
    if isinstance(value, dict):
        for key, inner in cast(dict[Any, Any], value).items():
            if key == "_target_":
                raise ConfigError(
                    f"{join(at, key)}: got {shown(inner)}; allowed: no _target_ anywhere; "
                    "configuration holds values, and classes are chosen in code by name"
                )
            refuse_targets(inner, join(at, key))
    elif isinstance(value, list):
        for idx, inner in enumerate(cast(list[Any], value)):
            refuse_targets(inner, f"{at}[{idx}]")


def read(kind: Any, value: Any, at: str) -> Any:
    """Return `value`, found at key path `at`, as the annotation `kind` wants it.

    Args:
        kind: a type annotation; the list of those understood is in `launch.compose.build`.
        value: dict, list or scalar, as a YAML file gives it.
        at: full key path of `value`, for messages.

    Raises:
        ConfigError: if `value` does not fit, or a `__post_init__` raises ValueError.
        TypeError: if `kind` is not understood.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(value, str) and value == _MISSING:
        raise ConfigError(f"{at}: no value given yet ({_MISSING}); allowed: {_words(kind)}")
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, at)
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
    elif origin in (Union, types.UnionType):
        return _read_union(kind, value, at)
    elif origin is tuple:
        return _read_tuple(kind, value, at)
    elif origin in (dict, Mapping):
        return _read_dict(kind, value, at)
    elif kind in _SCALARS:
        return _read_scalar(kind, value, at)
    else:
        raise TypeError(f"{at}: build() does not know the annotation {kind!r}")
    raise _wrong(kind, value, at)


def _read_scalar(kind: Any, value: Any, at: str) -> Any:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, str) and _EXPONENT_FLOAT.fullmatch(value):
        return float(value)
    if kind is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if kind is str and isinstance(value, (int, float)):
        raise _wrong(kind, value, at, hint=f'for the text write "{value}", quotes included')
    raise _wrong(kind, value, at)


def _read_dataclass(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(kind, value, at)
    values = cast(dict[Any, Any], value)
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in values:
        if key not in fields:
            raise ConfigError(_unknown(key, values[key], at, list(fields)))
    missing = [
        f"{join(at, name)}: missing; allowed: {_words(hints[name])}"
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError("\n".join(missing))
    filled = {key: read(hints[key], inner, join(at, key)) for key, inner in values.items()}
    try:
        return kind(**filled)
    except ValueError as error:
        # An owner that knows where it stands has already written the full key.
        known = not at or str(error).startswith((f"{at}.", f"{at}:"))
        raise ConfigError(str(error) if known else f"{at}: {error}") from error


def _read_union(kind: Any, value: Any, at: str) -> Any:
    """Try the members in the order they are written; `X | None` keeps X's own message."""
    members = [member for member in get_args(kind) if member is not type(None)]
    if value is None:
        if len(members) < len(get_args(kind)):
            return None
        raise _wrong(kind, value, at)
    if len(members) == 1 and members[0] not in _SCALARS:
        return read(members[0], value, at)
    exact = [member for member in members if member is type(value)]
    for member in exact + members:
        with contextlib.suppress(ConfigError):
            return read(member, value, at)
    raise _wrong(kind, value, at)


def _read_tuple(kind: Any, value: Any, at: str) -> Any:
    arguments = get_args(kind)
    if not isinstance(value, list):
        raise _wrong(kind, value, at)
    items = cast(list[Any], value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(arguments) != len(items):
        raise _wrong(kind, value, at)
    pairs = zip(arguments, items, strict=True)
    return tuple(read(member, item, f"{at}[{idx}]") for idx, (member, item) in enumerate(pairs))


def _read_dict(kind: Any, value: Any, at: str) -> Any:
    key_kind, value_kind = get_args(kind)
    if key_kind is not str:
        raise TypeError(f"{at}: build() knows dict[str, T] only, not {kind!r}")
    if not isinstance(value, dict):
        raise _wrong(kind, value, at)
    values = cast(dict[Any, Any], value)
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{join(at, key)}: key {shown(key)}; allowed: text as key; quote it")
    return {key: read(value_kind, inner, join(at, key)) for key, inner in values.items()}


def unread(value: Any) -> Any:
    """Return the dicts, lists and scalars from which `read` makes an equal value.

    Raises:
        TypeError: if `value` holds something that `read` does not make.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.init]
        return {field.name: unread(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: unread(inner) for key, inner in cast(Mapping[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [unread(inner) for inner in cast(Sequence[Any], value)]
    if isinstance(value, (str, Path)):
        # A value that only looks like an interpolation must come back as the text it is.
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise TypeError(f"to_yaml() does not know {shown(value)}")


def join(at: str, key: Any) -> str:
    """Return the key path of `key` inside `at`."""
    return f"{at}.{key}" if at else str(key)


def shown(value: Any) -> str:
    """Return `value` with its type, for a message."""
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def first_line(error: BaseException) -> str:
    """Return the first line of the message of `error`, or its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _wrong(kind: Any, value: Any, at: str, *, hint: str = "") -> ConfigError:
    text = f"{at or 'the configuration'}: got {shown(value)}; allowed: {_words(kind)}"
    return ConfigError(f"{text}; {hint}" if hint else text)


def _unknown(key: Any, value: Any, at: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(str(key), allowed, n=1)
    nearest = f"; nearest: {join(at, close[0])}" if close else ""
    return f"{join(at, key)}: unknown key, got {shown(value)}{nearest}; allowed here: " + (
        ", ".join(allowed) or "no keys"
    )


def _words(kind: Any) -> str:
    """Return annotation `kind` in words for a message."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if dataclasses.is_dataclass(kind):
        names = ", ".join(field.name for field in dataclasses.fields(kind) if field.init)
        return f"a mapping with the keys {names or '(none)'}"
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(member) for member in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list of {_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(_words(member) for member in arguments)
    if origin in (dict, Mapping):
        return f"a mapping from names to {_words(arguments[1])}"
    return {Path: "a path, not empty"}.get(kind, getattr(kind, "__name__", repr(kind)))
