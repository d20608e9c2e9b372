"""Does wandb run online, offline or not at all, and under which run id?

The same order as wandb's own: what the configuration asks for, then the environment
(`WANDB_MODE`), then what `wandb offline` or `wandb disabled` left in a settings file, and at last
whether the user is logged in: `WANDB_API_KEY`, `WANDB_IDENTITY_TOKEN_FILE`, or a netrc entry for
the server, which is what `wandb login` writes. Without a login the run is offline: wandb would
otherwise prompt for a key, and a prompt is a hang on a compute node.

Nothing here imports wandb, so the answer is known before the slow import and without it.
"""

import configparser
import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, cast
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

WandbMode: TypeAlias = Literal["auto", "offline", "online", "disabled"]
ChosenMode: TypeAlias = Literal["offline", "online", "disabled"]

_CHOSEN_MODES = ("offline", "online", "disabled")
_DEFAULT_SERVER = "https://api.wandb.ai"
# WANDB_MODE and settings files know more words than we do.
_SYNONYMS = {"run": "online", "dryrun": "offline"}


def choose_mode(
    mode: WandbMode, *, environment: Mapping[str, str], home: Path, folder: Path
) -> tuple[ChosenMode, str]:
    """Return the mode in which wandb runs, and the reason in words for the log.

    Args:
        mode: what the configuration asks for; "auto" leaves it to the user's own settings.
        environment: environment variables, normally os.environ.
        home: the user's home folder, where netrc and wandb's settings stand.
        folder: the working folder, where `wandb offline` leaves its settings.
    """
    if mode != "auto":
        return mode, "the configuration asks for it"
    asked = environment.get("WANDB_MODE", "").strip().lower()
    asked = _SYNONYMS.get(asked, asked)
    if asked in _CHOSEN_MODES:
        return asked, "WANDB_MODE asks for it"
    if asked:
        log.warning("WANDB_MODE=%s is not understood; allowed: %s", asked, ", ".join(_CHOSEN_MODES))
    settings = _read_settings(environment=environment, home=home, folder=folder)
    if settings.get("disabled", "").lower() == "true":
        return "disabled", "a wandb settings file asks for it"
    saved = settings.get("mode", "").lower()
    saved = _SYNONYMS.get(saved, saved)
    if saved in ("offline", "disabled"):
        return cast(ChosenMode, saved), "a wandb settings file asks for it"
    server = environment.get("WANDB_BASE_URL") or settings.get("base_url") or _DEFAULT_SERVER
    login = _find_login(server, environment=environment, home=home)
    if login:
        return "online", f"logged in by {login}"
    return "offline", f"not logged in to {server}"


def _read_settings(
    *, environment: Mapping[str, str], home: Path, folder: Path
) -> Mapping[str, str]:
    config_folder = environment.get("WANDB_CONFIG_DIR") or str(home / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([Path(config_folder) / "settings", folder / "wandb" / "settings"])
    except (configparser.Error, UnicodeDecodeError) as error:
        log.warning("wandb settings file not understood: %s", error)
    return dict(parser["default"]) if parser.has_section("default") else {}


def _find_login(server: str, *, environment: Mapping[str, str], home: Path) -> str:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if environment.get(name):
            return name
    named = environment.get("NETRC")
    paths = [Path(named).expanduser()] if named else [home / ".netrc", home / "_netrc"]
    path = next((path for path in paths if path.exists()), None)
    host = urlsplit(server).hostname
    if path is None or host is None:
        return ""
    try:
        return str(path) if netrc.netrc(path).authenticators(host) else ""
    except (netrc.NetrcParseError, OSError) as error:
        log.warning("%s not understood, taken as not logged in: %s", path, error)
        return ""


def keep_run_id(run_dir: Path, *, environment: Mapping[str, str]) -> str:
    """Return the wandb id of a run folder, made at the first call and the same ever after.

    `WANDB_RUN_ID` is taken if set. Otherwise the id stands in `<run_dir>/wandb_id`.

    Args:
        run_dir: folder of the run.
        environment: environment variables, normally os.environ.

    Raises:
        OSError: if the folder cannot be read or written.
    """
    if environment.get("WANDB_RUN_ID"):
        return environment["WANDB_RUN_ID"]
    path = run_dir / "wandb_id"
    if path.exists() and (kept := path.read_text(encoding="ascii").strip()):
        return kept
    run_dir.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(4)
    draft = path.with_suffix(".tmp")
    draft.write_text(run_id + "\n", encoding="ascii")
    os.replace(draft, path)
    return run_id
