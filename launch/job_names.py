"""What are the jobs of a sweep called, and which are they?

`-m` and `launch/submit.py job=sweep` make the same jobs with the same names, so that one finds the
folders of the other.
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.config_tree import ConfigError, shown
from pretrain.monitor.secrets import scrub
from pretrain.training.run_name import MAX_CHARACTERS, RULE, is_run_name

_DIGEST_CHARACTERS = 8


def job_name(cfg: DictConfig) -> str:
    """Return the run's name, the same on every start: `cfg.name`, in a sweep with its overrides.

    A job of `-m layout=a,b name=first` is called `first/layout=a`, after the keys that vary: no
    timestamp and no job number, so the same command finds its own folders again. Characters that a
    folder name cannot hold are replaced, and a digest then keeps two jobs apart.

    Raises:
        ConfigError: if `name` is missing or could not be a folder name.
    """
    name = OmegaConf.select(cfg, "name")
    if not isinstance(name, str) or not is_run_name(name):
        raise ConfigError(f"name: got {shown(name)}; allowed: {RULE}")
    if not in_sweep():
        return name
    hydra_cfg = HydraConfig.get()
    skipped = {"name", *hydra_cfg.job.config.override_dirname.exclude_keys}
    overrides = [str(text) for text in hydra_cfg.overrides.task]
    return f"{name}/{_job_folder(overrides, keys=_swept_keys(sys.argv[1:]), skipped=skipped)}"


def _job_folder(overrides: Sequence[str], *, keys: set[str], skipped: set[str]) -> str:
    """Return the folder of one job of a sweep: its overrides of `keys`, of all where none vary."""
    kept = sorted(
        text
        for text in (override.lstrip("+") for override in overrides)
        if (key := text.partition("=")[0]) not in skipped and (not keys or key in keys)
    )
    return _folder(",".join(kept) or "defaults")


def jobs_of_sweep(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the jobs that `-m` would make: (what `job_name` puts behind the name, overrides).

    Raises:
        ConfigError: if no key has several values, or one has a `glob`.
        HydraException: if a word is no override.
    """
    choices: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(list(words)):
        if not override.is_sweep_override():
            choices.append([override.input_line or ""])
            continue
        if not (override.is_choice_sweep() or override.is_range_sweep()):
            raise ConfigError(f"{override.input_line}: allowed in a sweep: values, choice, range")
        key = override.get_key_element()
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    keys = _swept_keys(words)
    if not keys:
        raise ConfigError(
            "job=sweep given, but no key with several values; allowed: as optimizer.lr=1e-3,2e-3"
        )
    jobs = [list(job) for job in itertools.product(*choices)]
    return [(_job_folder(job, keys=keys, skipped={"name"}), job) for job in jobs]


def _swept_keys(words: Sequence[str]) -> set[str]:
    """Return the keys that the command line gives several values."""
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {
        override.get_key_element().lstrip("+")
        for override in parsed
        if override.is_sweep_override()
    }


def _folder(text: str) -> str:
    if is_run_name(text) and scrub(text) == text:
        return text
    safe = re.sub(r"[^A-Za-z0-9.,=+-]|\.{2,}", "_", scrub(text)).lstrip("._,=+-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return f"{safe[: MAX_CHARACTERS - _DIGEST_CHARACTERS - 1]}-{digest}".lstrip("-")


def in_sweep() -> bool:
    """Return whether this is a job of a sweep (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
