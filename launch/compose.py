"""How does a composed configuration reach a command, and how does a command end?

Hydra composes plain YAML; `build` turns the result into frozen dataclasses and refuses what it does
not know: unknown keys, missing keys, wrong types, `_target_` (`launch/config_tree.py`). `run` is
the border between Hydra and the shell: a mistake of the user is one message on stderr and exit code
2, a mistake of ours keeps its traceback. Why there are no structured configs:
docs/decisions/0003-hydra-without-structured-configs.md.

A launch file is this and nothing more::

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import hydra
    from launch.compose import Composed, build, run

    @hydra.main(version_base=None, config_path="../conf", config_name="pretrain")
    def main(cfg: Composed) -> None:
        train(build(RunConfig, cfg))

    if __name__ == "__main__":
        sys.exit(run(main))
"""

import contextlib
import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from launch.config_tree import ConfigError, first_line, join, read, refuse_targets, shown, unread
from launch.hydra_limits import limited, refuse_words, scrub_sweep_file
from launch.job_names import in_sweep
from pretrain.monitor.secrets import guard_tracebacks, print_traceback, scrub, scrubbed

T = TypeVar("T")

Composed = DictConfig
"""What Hydra hands to `main`: the annotation for launch files, which do not know OmegaConf."""

USER_ERROR_CODE = 2
CRASH_CODE = 1
UMASK = 0o027
"""Of what a command writes: nothing for others, nothing that the group writes into."""

_FULL_ERROR = "HYDRA_FULL_ERROR"
_exit_codes: ContextVar[list[int] | None] = ContextVar("exit_codes", default=None)


# --------------------------------------------------------------------------------------------------
# YAML values -> dataclasses
# --------------------------------------------------------------------------------------------------


def build(cls: type[T], cfg: Mapping[str, Any] | DictConfig, *, at: str = "") -> T:
    """Return the dataclass `cls` filled from `cfg`, every nested value checked.

    Annotations understood: dataclasses, int, float, bool, str, Path, Literal, `X | Y`, `X | None`,
    `tuple[T, ...]`, `tuple[T1, T2]`, `dict[str, T]`. Where a float is wanted an int will do, and so
    will the text of a number with an exponent ("3e-4" is text to YAML 1.1); a bool is not an int.
    Interpolations are resolved.

    Args:
        cls: a dataclass; fields without a default are required.
        cfg: values by field name, plain or from Hydra.
        at: key path of `cfg` inside the whole configuration, put before every key in messages.

    Raises:
        ConfigError: unknown key, missing key, wrong type, `_target_`, an interpolation that leads
            nowhere, or a ValueError from a `__post_init__`, with the key path in front.
        TypeError: if a field of `cls` has an annotation outside the list above (our mistake).
    """
    values = _plain(cfg, at)
    refuse_targets(values, at)
    return cast(T, read(cls, values, at))


def to_yaml(config: Any) -> str:
    """Return the dataclass `config` as YAML from which `from_yaml` builds an equal one.

    Raises:
        TypeError: if a value is of a type that `build` does not make.
    """
    return OmegaConf.to_yaml(OmegaConf.create(unread(config)))


def to_public_yaml(config: Any) -> str:
    """Return the dataclass `config` as YAML to be kept in a file: `***` where a secret stood.

    Raises:
        TypeError: as `to_yaml`.
    """
    return OmegaConf.to_yaml(OmegaConf.create(scrubbed(unread(config))))


def from_yaml(cls: type[T], text: str) -> T:
    """Return the dataclass `cls` from what `to_yaml` wrote, such as a run's config.yaml.

    Raises:
        ConfigError: as `build`, and if `text` is not a YAML mapping.
    """
    cfg = OmegaConf.create(text)
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{cls.__name__}: got {shown(text[:80])}; allowed: a YAML mapping")
    return build(cls, cfg)


def _plain(node: Any, at: str) -> Any:
    """Return `node` as dicts, lists and scalars, interpolations resolved."""
    if OmegaConf.is_config(node):
        try:
            return OmegaConf.to_container(node, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key or at}: {first_line(error)}") from error
    if isinstance(node, Mapping):
        mapping = cast(Mapping[Any, Any], node)
        return {key: _plain(value, join(at, key)) for key, value in mapping.items()}
    if isinstance(node, (list, tuple)):
        items = cast(Sequence[Any], node)
        return [_plain(value, f"{at}[{idx}]") for idx, value in enumerate(items)]
    return node


# --------------------------------------------------------------------------------------------------
# Hydra -> shell
# --------------------------------------------------------------------------------------------------


def run(main: Callable[..., Any], *, user_errors: tuple[type[Exception], ...] = ()) -> int:
    """Return the exit code of the `@hydra.main` function `main` run on this command line.

    0 unless something else was recorded. Errors of Hydra and OmegaConf, ValueError (with it
    ConfigError) and `user_errors` are the user's: one `error: ...` on stderr and code 2. In a sweep
    (`-m`) a failing job is recorded, with 2 or else with 1 and its traceback, and the sweep goes
    on; the largest code is returned. Hydra's own verbs (`--cfg`, `--help`, `--info`, completion)
    keep their codes. With HYDRA_FULL_ERROR=1 the traceback is shown as well.

    Args:
        main: the decorated function; called with no argument, so Hydra reads sys.argv.
        user_errors: further exception classes that the user can mend.

    Raises:
        TypeError: if `main` is not decorated with `@hydra.main`.
        Exception: what a single run raised and is not a user error: it is a bug and keeps its
            traceback.
    """
    user_errors = (ValueError, OmegaConfBaseException, HydraException, *user_errors)
    codes: list[int] = []
    token = _exit_codes.set(codes)
    put_back = guard_tracebacks()
    try:
        with _full_error("1") as full_error, restricted_umask(), limited():
            try:
                refuse_words(sys.argv[1:])
                _rewrapped(main, user_errors=user_errors, full_error=full_error)()
            except user_errors as error:
                codes.append(_report(error, full_error=full_error))
            except SystemExit as stop:
                codes.append(_status(stop))
    finally:
        # an error that goes on to the interpreter still finds the guard
        if sys.exc_info()[0] is None:
            put_back()
        _exit_codes.reset(token)
    return max(codes, default=0)


@contextlib.contextmanager
def restricted_umask() -> Iterator[None]:
    """Let files be 0640 and folders 0750 at most, for this process and all that it starts."""
    before = os.umask(UMASK)
    os.umask(before | UMASK)
    try:
        yield
    finally:
        os.umask(before)


def record_exit_code(code: int) -> None:
    """Keep `code`, in [0, 255], for the `run` that is under way; the largest one wins.

    Hydra drops what a task function returns, so a launch file says its exit code here.

    Raises:
        ValueError: if `code` is no exit code.
        RuntimeError: if no `run` is under way (our mistake).
    """
    codes = _exit_codes.get()
    if codes is None:
        raise RuntimeError("record_exit_code() was called outside launch.compose.run()")
    if not 0 <= code <= 255:
        raise ValueError(f"exit code: got {code}; allowed: 0 to 255")
    codes.append(code)


def composed(config_name: str, words: Sequence[str]) -> DictConfig:
    """Return another configuration of conf/, inside a `run`; refuses what Hydra's main refuses."""
    return hydra.compose(config_name, list(words))


@contextlib.contextmanager
def _full_error(value: str | None) -> Iterator[str | None]:
    """Set HYDRA_FULL_ERROR (None removes it), yield what it was, and put that back."""
    before = os.environ.pop(_FULL_ERROR, None)
    if value is not None:
        os.environ[_FULL_ERROR] = value
    try:
        yield before
    finally:
        os.environ.pop(_FULL_ERROR, None)
        if before is not None:
            os.environ[_FULL_ERROR] = before


def _rewrapped(
    main: Callable[..., Any],
    *,
    user_errors: tuple[type[Exception], ...],
    full_error: str | None,
) -> Callable[[], Any]:
    """Return `main` decorated again, with a guard around each job and an absolute config path.

    The guard is needed because Hydra runs all jobs of a sweep and then raises the first failure
    only. The arguments of `@hydra.main` are read from its closure, the one place that has them.
    The path is made absolute because Hydra looks for a Python package `conf` when the launch file
    was imported instead of started.
    """
    kept = inspect.getclosurevars(main).nonlocals if inspect.isfunction(main) else {}
    if not {"task_function", "config_path", "config_name"} <= kept.keys():
        raise TypeError("run() wants the function that @hydra.main decorates")
    task, config_path = kept["task_function"], kept["config_path"]
    if config_path is not None and not config_path.startswith("pkg://"):
        config_path = str((Path(inspect.getfile(task)).resolve().parent / config_path).resolve())

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> None:
        # Ranks and tools that the job starts see the user's own environment.
        with _full_error(full_error):
            try:
                if in_sweep():
                    scrub_sweep_file()
                task(cfg)
            except user_errors as error:
                record_exit_code(_report(error, full_error=full_error))
            except SystemExit as stop:
                record_exit_code(_status(stop))
            except Exception as error:  # a mistake of ours ends its job, not the sweep
                if not in_sweep():
                    raise
                print_traceback(error)
                record_exit_code(CRASH_CODE)

    decorate = hydra.main(
        version_base=None,
        config_path=config_path,
        config_name=kept["config_name"],
    )
    return decorate(guarded)


def _status(stop: SystemExit) -> int:
    if isinstance(stop.code, str):
        print(scrub(stop.code), file=sys.stderr)
        return CRASH_CODE
    return stop.code or 0


def _report(error: Exception, *, full_error: str | None) -> int:
    """Print the one message that the user needs; return the exit code of a user error."""
    if full_error == "1":
        print_traceback(error)
    if (
        os.environ.get("RANK", "0") == "0"
    ):  # under torchrun every rank gets here with the same words
        print(f"error: {scrub(_explained(error))}", file=sys.stderr, flush=True)
    return USER_ERROR_CODE


def _explained(error: Exception) -> str:
    """Return the message of `error`, in our words where Hydra speaks of its own insides."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        close = difflib.get_close_matches(choice, error.options, n=1)
        nearest = f"; nearest: {group}={close[0]}" if close else ""
        return f"{group}={choice}: no such file{nearest}; allowed: {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        said = [line for line in str(error).splitlines() if not line.startswith(("Error", "See "))]
        return f"{error.override}: not an override (key=value): {' '.join(said)}"
    if isinstance(error, HydraException):
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            return _explained_key(error, cause)
        parts = [" ".join(str(part).split()) for part in (error, cause) if part is not None]
        return "; ".join(part for part in parts if part) or type(error).__name__
    text = str(error) or type(error).__name__
    foreign = isinstance(error, ValueError) and not isinstance(error, ConfigError)
    return f"{text} ({_FULL_ERROR}=1 shows where)" if foreign else text


def _explained_key(error: HydraException, cause: OmegaConfBaseException) -> str:
    """Return which key of the command line does not exist, and which ones come near."""
    found = re.search(r"use \+(\S.*)", str(error)) or re.search(r"override (\S.*)", str(error))
    override = found[1] if found else str(cause.full_key)
    key = override.partition("=")[0].lstrip("+~")
    # The parent is the node that lacks the key; only its root knows the rest of the tree.
    root = cause.parent_node._get_root() if cause.parent_node is not None else OmegaConf.create()
    paths = _paths(OmegaConf.to_container(root, resolve=False), "")
    close = _nearest(key, [path for path in paths if not path.startswith("hydra.")])
    nearest = f"; nearest: {', '.join(close)}" if close else ""
    return f"{key}: no such key{nearest}; to add a new key write +{override}"


def _paths(value: Any, at: str) -> list[str]:
    if not isinstance(value, dict):
        return [at]
    below = [_paths(inner, join(at, key)) for key, inner in cast(dict[Any, Any], value).items()]
    return ([at] if at else []) + [path for paths in below for path in paths]


def _nearest(key: str, paths: list[str]) -> list[str]:
    """Return up to three of `paths`, best first: near as a whole, or near in the last word."""

    def closeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, key, path).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], path.split(".")[-1]).ratio()
        return max(whole, 0.9 * last)

    ranked = sorted(paths, key=closeness, reverse=True)
    return [path for path in ranked[:3] if closeness(path) >= 0.65]
