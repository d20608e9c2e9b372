"""What may a run be called, and what may a path of its configuration hold? No torch.

A name becomes a folder, a word of commands and of messages. So it holds what none of them reads as
something else, and never leads out of the folder of all runs. A job of a sweep has one slash:
`first/layout=a`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pretrain.monitor.secrets import scrub

MAX_CHARACTERS = 128
"""Of a name, and of what a sweep appends to it."""
RULE = (
    "letters, digits and . _ , = + - (ASCII), beginning with a letter or digit, at most"
    f" {MAX_CHARACTERS} characters and no .."
)
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,=+-]*")
_URLS = ("data.train",)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_run_name(text: str) -> bool:
    """Return whether `text` is the name of a run, without a slash."""
    return bool(_PART.fullmatch(text)) and len(text) <= MAX_CHARACTERS and ".." not in text


def check_run_name(name: str) -> None:
    """Refuse what could not be a run's folder, or would tell a secret.

    Args:
        name: of a run; of a job of a sweep with one slash.

    Raises:
        ValueError: says what is allowed.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(map(is_run_name, parts)):
        raise ValueError(f"name={name[: 2 * MAX_CHARACTERS]!r} given, allowed: {RULE}")
    if scrub(name) != name:
        raise ValueError(
            f"name={scrub(name)} given, which holds a secret where *** stands; allowed: a name that"
            " may be read by everybody"
        )


def check_places(config: Mapping[str, Any], *, at: str = "") -> None:
    """Refuse paths and URLs that no file can have, or that would break a line of a log.

    Args:
        config: values by name; looked at is each Path, and what may be a URL.
        at: key of `config` in the whole configuration.

    Raises:
        ValueError: names the key.
    """
    for name, value in config.items():
        key = f"{at}{name}"
        if isinstance(value, Mapping):
            check_places(cast(Mapping[str, Any], value), at=f"{key}.")
        elif (isinstance(value, Path) or key in _URLS) and _CONTROL.search(str(value)):
            raise ValueError(
                f"{key}={str(value)!r} given, allowed: a path without line ends and other control"
                " characters"
            )
