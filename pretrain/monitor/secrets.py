"""Which words must not be written down, and what stands in their place?

A run writes its configuration, its command line and the words of its errors into many files that
more people read than may use its passwords. `scrub` puts `***` in the place of what is secret in a
text, `scrubbed` in every text of a tree of JSON values; whoever writes a file that people read
calls one of them. Three things are secret:

- the values of environment variables whose names say so (`HF_TOKEN`, `DB_PASSWORD`), wherever they
  stand, from 8 characters on: shorter ones are words that stand everywhere;
- what a name says is secret: `api_key=...`, `password: ...`, `?token=...`, `user:password@host`;
- what looks like a key of a known service, or like a private key.

Forty hexadecimal digits are a key of wandb, and also a commit: they count only in the first two
ways. Digests of 64 digits and commits of 12 are left alone. Every pattern takes time linear in the
text.
"""

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

STARS = "***"
_LEAST_CHARACTERS = 8
_MANY_DIGITS = 16  # fewer are a number that may stand anywhere

_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:key|apikey|token|pat|credentials?)$|passw(?:or)?d|passphrase|secret|access_?key"
    r"|webhook_?url",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?[\d_.]{1,40}(?:[eE][-+]?\d{1,4})?")
_NEVER_SECRET = ("true", "false", "null", "none", STARS)

_ASSIGNED = re.compile(
    r"((?:(?:api|_|-)_?key|token|credentials?)[\"']?[ \t]{0,3}[=:][ \t]{0,3}[\"']?)([^\s\"']{8,})"
    r"|((?:passw(?:or)?d|passphrase|secret|access_key)[\"']?[ \t]{0,3}[=:][ \t]{0,3}[\"']?)"
    r"([^\s\"']+)",
    re.IGNORECASE,
)
_QUERY = re.compile(
    r"([?&](?:[\w.-]{0,30}(?:token|key|secret|signature|password|credential)|sig)=)[^&\s#\"']+",
    re.IGNORECASE,
)
_USER = re.compile(r"(?<=://)[^\s/?#<>]*@")
# What stands before must not be a part of the key: each run of its characters is looked at once.
_KEYS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,30}KEY-----|\Z)",
        r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?",  # JSON web token
        r"(?<!\w)wandb_v\d+_\w{20,}",
        r"(?<!\w)hf_[A-Za-z0-9]{30,}",
        r"(?<!\w)(?:AKIA|ASIA)[A-Z0-9]{16}(?!\w)",  # AWS
        r"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,})",
        r"(?<![\w-])glpat-[\w-]{20,}",  # GitLab
        r"(?<![\w-])xox[abeprs]-[\w-]{10,}",  # Slack
        r"(?<![\w-])sk-[\w-]{32,}",  # OpenAI, Anthropic
        r"(?<![\w-])AIza[\w-]{35}",  # Google
    )
)
_BEARER = re.compile(r"(\bbearer[ \t]{1,3})[\w.~+/=-]{16,}", re.IGNORECASE)


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secrets of an environment, the longest first.

    Left out are values of fewer than 8 characters, numbers, and paths of files that exist: those
    name a secret and are none.

    Args:
        environment: variables, normally os.environ.
    """
    found = {
        value
        for name, value in environment.items()
        if is_secret_name(name)
        and len(value) >= _LEAST_CHARACTERS
        and not (value.isdigit() and len(value) < _MANY_DIGITS)
        and not (value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value)))
    }
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def is_secret_name(name: str) -> bool:
    """Return whether a variable or key of this name holds a secret, such as `HF_TOKEN`."""
    return _SECRET_NAME.search(name) is not None


def scrub(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """Return a text with `***` where a secret stood.

    Args:
        text: any; what is no secret comes back as it was.
        environment: whose secrets are looked for; None: the process's own.
    """
    for value in secret_values(os.environ if environment is None else environment):
        text = text.replace(value, STARS)
    for pattern in _KEYS:
        text = pattern.sub(STARS, text)
    text = _USER.sub(f"{STARS}@", text)
    text = _QUERY.sub(rf"\1{STARS}", text)
    text = _BEARER.sub(rf"\1{STARS}", text)
    return _ASSIGNED.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    name, value = (found[1], found[2]) if found[1] else (found[3], found[4])
    return found[0] if not _may_be_secret(value) else f"{name}{STARS}"


def _may_be_secret(value: str) -> bool:
    plain = value.rstrip(",;)]}")
    return plain.lower() not in ("", *_NEVER_SECRET) and not _NUMBER.fullmatch(plain)


def scrubbed(value: Any, *, environment: Mapping[str, str] | None = None) -> Any:
    """Return a copy of JSON values in which no text holds a secret, nor any name of a mapping.

    Texts under a name that says they are secret become `***` altogether; numbers, truth values and
    null stay.

    Args:
        value: JSON values.
        environment: see `scrub`.
    """
    if isinstance(value, str):
        return scrub(value, environment=environment)
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        return {
            scrub(name, environment=environment) if isinstance(name, str) else name: STARS
            if _is_secret_entry(name, entry)
            else scrubbed(entry, environment=environment)
            for name, entry in entries.items()
        }
    if isinstance(value, list | tuple):
        return [scrubbed(entry, environment=environment) for entry in cast(list[Any], value)]
    return value


def _is_secret_entry(name: object, entry: object) -> bool:
    if not isinstance(name, str) or not isinstance(entry, str):
        return False
    return is_secret_name(name) and _may_be_secret(entry)


class ScrubbingFormatter(logging.Formatter):
    """A line of a log without secrets, its traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return scrub(super().format(record))


def start_log(*, level: int, format: str) -> None:
    """Send the log to stderr without secrets; a log that goes somewhere already stays as it is.

    Args:
        level: of the root.
        format: of a line, as logging.basicConfig takes it.
    """
    stream = logging.StreamHandler()
    stream.setFormatter(ScrubbingFormatter(format))
    logging.basicConfig(level=level, handlers=[stream])


def print_traceback(error: BaseException) -> None:
    """Write an error's traceback to stderr, without secrets."""
    sys.stderr.write(scrub("".join(traceback.format_exception(error))))
    sys.stderr.flush()


def guard_tracebacks() -> Callable[[], None]:
    """Keep secrets out of what the interpreter itself writes: uncaught errors, a log unset.

    Returns:
        What puts back what was there before.
    """
    before = (sys.excepthook, threading.excepthook)
    last = logging.lastResort
    formatter = None if last is None else last.formatter

    def in_thread(arguments: Any) -> None:
        if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
            print_traceback(arguments.exc_value)

    sys.excepthook = lambda _kind, error, _traceback: print_traceback(error)
    threading.excepthook = in_thread
    if last is not None:
        last.setFormatter(ScrubbingFormatter())

    def put_back() -> None:
        sys.excepthook, threading.excepthook = before
        if last is not None:
            last.setFormatter(formatter)

    return put_back
