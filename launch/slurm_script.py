"""What does a batch script say? Options of sbatch, settings in bash, and a body that never varies.

Whatever a user has written reaches bash as a quoted word of an array and is never looked at again:
there is no `eval`, and the bodies (segment.sh, task.sh) are files that shellcheck reads as they
are. What stands in a `#SBATCH` line is read by SLURM and by no shell, so there only plain
characters are let through.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.config_tree import ConfigError

BODIES = Path(__file__).resolve().parent
Setting = str | int | Sequence[str] | Sequence[int]
_PLAIN = re.compile(r"[\w.,:=/@+%-]*", re.ASCII)
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)


def script(
    options: Mapping[str, str],
    *,
    environment: Mapping[str, str],
    settings: Mapping[str, Setting],
    body: str,
) -> str:
    """Return the text of a batch script.

    Args:
        options: of sbatch, without dashes; one that takes no value has an empty one.
        environment: variables of the job.
        settings: what the body reads, by the names of bash variables.
        body: file of launch/ with the commands.

    Raises:
        ConfigError: if a value has characters that SLURM or a terminal would take for more than
            text, or a variable has no such name or sounds like a secret.
    """
    lines = ["#!/bin/bash"]
    lines += [_option(name, value) for name, value in options.items()]
    lines += ["# written by launch/submit.py: submit again instead of editing"]
    # a dollar that a user has written is text, and stays in its quotes
    lines += ["# shellcheck disable=SC2016", ""]
    lines += [_export(name, value) for name, value in environment.items()]
    lines += [_setting(name, value) for name, value in settings.items()]
    return "\n".join([*lines, "", (BODIES / body).read_text(encoding="utf-8")])


def _option(name: str, value: str) -> str:
    if not _PLAIN.fullmatch(value):
        raise ConfigError(
            f"#SBATCH --{name}: got {value!r}; allowed: letters of ASCII, digits and _ . , : = / @"
            " + % -, in the folders that the job names, too"
        )
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def _export(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ConfigError(f"slurm.environment: got the name {name!r}; allowed: a shell variable's")
    if _SECRET.search(name):
        raise ConfigError(
            f"slurm.environment.{name}: a script can be read by others; allowed: no secrets in it,"
            " they belong into a file that only you can read, as ~/.netrc"
        )
    return f"export {name}={_quoted(value)}"


def _setting(name: str, value: Setting) -> str:
    if isinstance(value, str | int):
        return f"readonly {name}={_quoted(str(value))}"
    return f"readonly -a {name}=({' '.join(_quoted(str(word)) for word in value)})"


def _quoted(text: str) -> str:
    """Return `text` as one word of bash."""
    if not text.isprintable():
        raise ConfigError(
            f"{text!r}: has a line break or another control character; allowed: printed text"
        )
    # as shlex.quote, but always: a bare word with a comma is a mistake to shellcheck
    return "'" + text.replace("'", "'\"'\"'") + "'"


def flattened(commands: Sequence[Sequence[str]]) -> dict[str, Setting]:
    """Return several commands as settings: bash knows no list of lists.

    Command i is WORDS from FIRST_WORDS[i] up to, not including, FIRST_WORDS[i + 1].
    """
    first = [0]
    for words in commands:
        first.append(first[-1] + len(words))
    return {"FIRST_WORDS": first, "WORDS": [word for words in commands for word in words]}
