"""What of Hydra may a command line or a YAML file change?

Hydra's own node can run code before a command has seen its configuration: `hydra.callbacks` builds
what its `_target_` names, launchers and sweepers are plugins, `hydra.searchpath` with `pkg://`
imports a package, `hydra.job.env_set` can set LD_PRELOAD for every child, and
`--experimental-rerun` unpickles a file. Our commands need none of it. So what may differ from
Hydra's defaults is a short list of keys; everything else is refused by name, wherever it was
written: on the command line, in a `--config-dir`, or in a configuration of another name. The check
stands where Hydra composes, before it acts on what it has composed.

Interpolations are values, not code; only a secret variable of the environment is refused, which
would be written into files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.config_tree import ConfigError, join, refuse_targets, shown
from pretrain.monitor.secrets import is_secret_name, scrub
from pretrain.training.run_name import RULE, is_run_name

_PLUGINS = {
    "launcher": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "sweeper": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
}
_CALLING = ("_target_", "()", "class", "factory")
"""Keys by which Hydra or logging.config builds an object from a name."""
_LOGGING = ("job_logging", "hydra_logging")
_REFUSED_WORDS = ("--experimental-rerun",)
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*)")
_INSTEAD = "configuration holds values, and classes are chosen in code by name"


def refuse_words(words: Sequence[str]) -> None:
    """Refuse what of a command line Hydra would act on before or while it composes.

    Args:
        words: of the command line, without the program.

    Raises:
        ConfigError: names the word.
    """
    for word in words:
        flag, _, _ = word.partition("=")
        # argparse takes every beginning of an option that is unique
        if flag.startswith("--e") and any(full.startswith(flag) for full in _REFUSED_WORDS):
            raise ConfigError(f"{flag}: no pickle is read; allowed: key=value and --config-dir")
        key, equals, value = word.lstrip("+~").partition("=")
        if equals and key.startswith("hydra.searchpath") and "pkg:" in value:
            raise ConfigError(f"{key}: got {shown(value)}; allowed: folders, as file:///a/b")
        if equals and key.startswith("hydra.job.env_"):
            raise _environment_refused(key, value)


@contextmanager
def limited() -> Iterator[None]:
    """Refuse, while it lasts, every composed configuration in which Hydra would run foreign code.

    Raises:
        ConfigError: inside, from Hydra's composing; names the key.
    """
    composed: Callable[..., DictConfig] = ConfigLoaderImpl.load_configuration

    def checked(self: ConfigLoaderImpl, *arguments: Any, **named: Any) -> DictConfig:
        try:
            cfg = composed(self, *arguments, **named)
        except yaml.YAMLError as error:  # a tag that names code is one, too
            words = " ".join(str(error).split())
            raise ConfigError(f"not YAML of plain values: {words}") from error
        refuse_code(cfg)
        if named.get("run_mode") == RunMode.MULTIRUN:
            _refuse_sweep_name(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = checked
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = composed


def scrub_sweep_file() -> None:
    """Take secrets out of the `multirun.yaml` that Hydra has written for this sweep.

    It holds the words of the command line, and Hydra has no setting to leave it out.
    """
    path = Path(HydraConfig.get().sweep.dir) / "multirun.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (shown_text := scrub(text)) != text:
        path.write_text(shown_text, encoding="utf-8")


def _refuse_sweep_name(cfg: DictConfig) -> None:
    """Refuse a name before Hydra makes a sweep's folder of it; jobs look at theirs themselves."""
    name = OmegaConf.select(cfg, "name", throw_on_missing=False)
    if isinstance(name, str) and not is_run_name(name):
        raise ConfigError(f"name: got {shown(name)}; allowed: {RULE}")


def refuse_code(cfg: DictConfig) -> None:
    """Refuse a composed configuration that names code, or a secret of the environment.

    Args:
        cfg: with Hydra's own node.

    Raises:
        ConfigError: names the key.
    """
    values = cast(dict[Any, Any], OmegaConf.to_container(cfg, resolve=False))
    hydra = cast(dict[str, Any], values.pop("hydra", None) or {})
    refuse_targets(values, "")
    _refuse_secret_variables(values, "")
    if hydra.get("callbacks"):
        raise ConfigError(f"hydra.callbacks: got {sorted(hydra['callbacks'])}; allowed: none")
    for name, target in _PLUGINS.items():
        plugin = cast(dict[str, Any], hydra.get(name) or {})
        if plugin.get("_target_") != target:
            raise ConfigError(
                f"hydra.{name}._target_: got {shown(plugin.get('_target_'))}; allowed: {target}"
            )
        _refuse_calls({**plugin, "_target_": None}, f"hydra.{name}")
    for name in _LOGGING:
        _refuse_calls(hydra.get(name), f"hydra.{name}")
    job = cast(dict[str, Any], hydra.get("job") or {})
    for name in ("env_set", "env_copy"):
        if job.get(name):
            raise _environment_refused(f"hydra.job.{name}", job[name])
    for place in cast(list[Any], hydra.get("searchpath") or []):
        if "pkg:" in str(place):
            raise ConfigError(f"hydra.searchpath: got {shown(place)}; allowed: folders")


def _environment_refused(key: str, value: object) -> ConfigError:
    return ConfigError(
        f"{key}: got {shown(value)}; allowed: nothing; set variables in the shell, or for the ranks"
        " of a cluster in cluster.environment"
    )


def _refuse_calls(value: Any, at: str) -> None:
    """Refuse keys by which an object would be built from a name.

    Hydra's own logging configurations name `logging.StreamHandler` and `logging.FileHandler`.
    """
    if isinstance(value, Mapping):
        for key, inner in cast(Mapping[Any, Any], value).items():
            harmless = inner is None or (key == "class" and str(inner).startswith("logging."))
            if key in _CALLING and not harmless:
                raise ConfigError(f"{join(at, key)}: got {shown(inner)}; allowed: none; {_INSTEAD}")
            _refuse_calls(inner, join(at, key))
    elif isinstance(value, list):
        for inner in cast(list[Any], value):
            _refuse_calls(inner, at)


def _refuse_secret_variables(value: Any, at: str) -> None:
    """Refuse `${oc.env:NAME}` where NAME is of a secret, or is itself computed."""
    if isinstance(value, Mapping):
        for key, inner in cast(Mapping[Any, Any], value).items():
            _refuse_secret_variables(inner, join(at, key))
    elif isinstance(value, list):
        for idx, inner in enumerate(cast(list[Any], value)):
            _refuse_secret_variables(inner, f"{at}[{idx}]")
    elif isinstance(value, str):
        for name in _ENVIRONMENT.findall(value):
            if "$" in name or is_secret_name(name.strip().strip("'\"")):
                raise ConfigError(
                    f"{at}: got {shown(value)}; allowed: variables that hold no secret, by name:"
                    " what a configuration holds is written into files"
                )
