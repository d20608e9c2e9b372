"""Can words of a command line, or a YAML file that they name, make a command run foreign code?

Each word tries to create a file by code of its own; none may, and the command ends with 2 before it
has begun. That the trap works at all is shown with Hydra's own `instantiate`.
"""

import contextlib
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from launch.compose import run
from launch.pretrain import main
from pretrain.training.start import USER_ERRORS

ROOT = Path(__file__).resolve().parents[2]
LOAD = "torch.hub.load_state_dict_from_url"
SECRET = "correct-horse-battery"

Attempt = Callable[..., tuple[int, str]]


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """Return the folder that hostile words try to make."""
    return tmp_path / "sprung"


@pytest.fixture
def trap(tmp_path: Path, sprung: Path) -> str:
    """Return the URL of a pickle that makes the folder."""
    path = tmp_path / "trap.pt"
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    return path.as_uri()


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Attempt:
    """Return what runs launch/pretrain.py here and gives its exit code and message."""
    started: list[object] = []
    monkeypatch.setattr("launch.pretrain.start", lambda *a, **_: started.append(a) or 0)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        started.clear()
        GlobalHydra.instance().clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = run(main, user_errors=USER_ERRORS)
        assert not started, "the run was started"
        return code, capsys.readouterr().err

    return call


def test_the_trap_springs_where_hydra_instantiates(trap: str, sprung: Path, tmp_path: Path) -> None:
    """Without it the tests below could pass because the trap is none."""
    with contextlib.suppress(Exception):
        instantiate(
            {"_target_": LOAD, "url": trap, "model_dir": str(tmp_path), "weights_only": False}
        )
    assert sprung.exists()


# each is one or more words; TRAP is the URL of the pickle, SPRUNG the folder, DIR a hostile conf/
HOSTILE = [
    ["+x._target_=" + LOAD, "+x.url=TRAP"],
    ["+x={_target_:" + LOAD + ",url:'TRAP'}"],
    ["+x=[{_target_:os.mkdir,_args_:['SPRUNG']}]"],
    ["+a.b.c.d._target_=os.mkdir"],
    ["+x=[[1,{y:{_target_:os.mkdir}}]]"],
    ["+model._target_=builtins.eval", "+model._args_=['1']"],
    ["+model.rope._target_=os.system"],
    ["+optimizer._target_=os.mkdir", "+optimizer._partial_=true"],
    ["++layout._target_=subprocess.run", "++layout._convert_=all"],
    ["+curriculum.stages.all._target_=runpy.run_path"],
    ["curriculum.stages={all:{_target_:os.mkdir}}"],
    ["+data._target_=numpy.load"],
    ["+telemetry._target_=shutil.copy"],
    ["model={_target_:os.mkdir,path:'SPRUNG'}"],
    ["+cluster={_target_:os.mkdir}"],
    ["+cluster.environment._target_=os.mkdir"],
    ["+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x._args_=['SPRUNG']"],
    ["+hydra.callbacks={x:{_target_:" + LOAD + ",url:'TRAP',weights_only:false}}"],
    ["-m", "hydra.launcher._target_=os.mkdir", "seed=1,2"],
    ["-m", "hydra.sweeper._target_=os.mkdir", "seed=1,2"],
    ["-m", "+hydra.launcher.x._target_=os.mkdir", "seed=1,2"],
    ["-m", "+hydra.sweeper.x={_target_:os.mkdir}", "seed=1,2"],
    ["+hydra.job_logging.handlers.x={class:tests.nowhere.Handler}"],
    ["+hydra.job_logging.formatters.x={(): os.mkdir}"],
    ["+hydra.hydra_logging.handlers.x={class:os.mkdir}"],
    ["+hydra.job.env_set.LD_PRELOAD=/tmp/x.so"],
    ["hydra.job.env_copy=[HF_TOKEN]"],
    ["hydra.searchpath=[pkg://hostile_package]"],
    ["--config-dir", "DIR", "+extra=callbacks"],
    ["--config-dir", "DIR", "+extra=target"],
    ["--config-dir", "DIR", "--config-name", "whole"],
    ["--config-dir", "DIR", "+extra=tag"],
    ["--config-dir", "DIR", "+extra=environment"],
    ["hydra.searchpath=[DIR]", "+extra=callbacks"],
    ["hydra.searchpath=[DIR]", "+extra=target"],
    ["--experimental-rerun", "PICKLE"],
    ["--experimental-rerun=PICKLE"],
    ["--exp", "PICKLE"],
    ["name='${oc.env:DB_PASSWORD}'"],
    ["+x='${oc.env:DB_PASSWORD,none}'"],
    ["+x='${oc.env:${y}}'", "+y=DB_PASSWORD"],
    ["change.reason='${oc.decode:${oc.env:DB_PASSWORD}}'"],
    ["+x='${oc.create:{_target_:os.mkdir}}'"],
    ["-m", "name=../../outside", "seed=1,2"],
    ["name='${eval:1}'"],
    ["name='${python:os.mkdir}'"],
]


@pytest.fixture
def hostile_conf(tmp_path: Path, trap: str, sprung: Path) -> Path:
    """Return a folder of YAML files that name code."""
    call = f"{{_target_: {LOAD}, url: '{trap}', model_dir: {tmp_path}, weights_only: false}}"
    files = {
        "extra/callbacks.yaml": f"# @package _global_\nhydra:\n  callbacks:\n    x: {call}\n",
        "extra/environment.yaml": "# @package hydra.job\nenv_set: {LD_PRELOAD: /tmp/x.so}\n",
        "extra/target.yaml": f"x: {call}\n",
        "extra/tag.yaml": f"x: !!python/object/apply:os.mkdir ['{sprung}']\n",
        "whole.yaml": f"defaults: [pretrain, _self_]\nhydra:\n  callbacks:\n    x: {call}\n",
    }
    for name, text in files.items():
        path = tmp_path / "hostile" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "hostile"


@pytest.mark.parametrize("words", HOSTILE, ids=lambda words: " ".join(words)[:60])
def test_hostile_words_run_nothing_and_end_with_2(
    attempt: Attempt,
    hostile_conf: Path,
    trap: str,
    sprung: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    # a package that would run, were it imported
    package = hostile_conf.parent / "path" / "hostile_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"import os; os.mkdir({str(sprung)!r})", encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    stands_for = {
        "TRAP": trap,
        "SPRUNG": str(sprung),
        "DIR": str(hostile_conf),
        "PICKLE": trap.removeprefix("file://"),
    }
    given = [
        re.sub("TRAP|SPRUNG|DIR|PICKLE", lambda found: stands_for[found[0]], word) for word in words
    ]
    code, said = attempt(*given)
    assert not sprung.exists()
    assert code == 2, said
    assert said.startswith("error: "), said  # not argparse, of a word in the wrong place
    assert SECRET not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+hydra.callbacks.x._target_=os.mkdir"], "hydra.callbacks: got ['x']"),
        (["hydra.launcher._target_=os.mkdir"], "hydra.launcher._target_: got 'os.mkdir'"),
        (["hydra.sweeper._target_=os.mkdir"], "hydra.sweeper._target_: got 'os.mkdir'"),
        (["+hydra.job.env_set.LD_PRELOAD=a"], "hydra.job.env_set.LD_PRELOAD: got "),
        (["hydra.searchpath=[pkg://a]"], "hydra.searchpath: got "),
        (["--experimental-rerun", "a"], "--experimental-rerun: no pickle is read"),
        (["name='${oc.env:HF_TOKEN}'"], "name: got '${oc.env:HF_TOKEN}'"),
    ],
)
def test_a_refusal_names_the_key(attempt: Attempt, words: list[str], said: str) -> None:
    code, message = attempt(*words)
    assert code == 2
    assert message.startswith(f"error: {said}"), message
    assert "allowed: " in message


def test_showing_a_configuration_is_checked_too(attempt: Attempt) -> None:
    code, message = attempt("--cfg", "hydra", "+hydra.callbacks.x._target_=os.mkdir")
    assert (code, "hydra.callbacks" in message) == (2, True)


def test_variables_without_secrets_may_be_asked_for(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "..")
    code, message = attempt("name='${oc.env:SLURM_JOB_NAME}'")
    assert (code, message.startswith("error: name: got '..'")) == (2, True), message


def test_every_command_is_guarded_alike() -> None:
    """A launch file that calls Hydra without `launch.compose.run` has none of this."""
    for path in sorted((ROOT / "launch").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "@hydra.main" in text and path.name != "compose.py":
            assert re.search(r"(sys\.exit\(|code = )run\((main|command)\b", text), path


def test_no_module_of_the_working_folder_is_imported(tmp_path: Path) -> None:
    """The working folder is not on sys.path: a torch.py there is not ours."""
    (tmp_path / "torch.py").write_text("raise SystemExit(77)", encoding="utf-8")
    (tmp_path / "omegaconf.py").write_text("raise SystemExit(77)", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), "seed=x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
