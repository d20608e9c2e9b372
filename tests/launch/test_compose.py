import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from omegaconf import OmegaConf

from launch.compose import ConfigError, record_exit_code, run
from launch.job_names import job_name

ROOT = Path(__file__).resolve().parents[2]


# --- run ------------------------------------------------------------------------------------------

COMMAND = '''
"""A launch file in the form of the house."""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, {root!r})
import hydra
from launch.compose import Composed, build, record_exit_code, run
from launch.job_names import job_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    hidden_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    name: str
    model: Model
    end: str | int
    words: tuple[str, ...]


@hydra.main(version_base=None, config_path="../conf", config_name="go")
def main(cfg: Composed) -> None:
    config = build(Config, cfg)
    said = ("job", job_name(cfg), config.model.hidden_size, os.environ.get("HYDRA_FULL_ERROR"))
    sys.stdout.write(" ".join(map(str, said)) + "\\n")  # one write: ranks share the stream
    if isinstance(config.end, int):
        record_exit_code(config.end)
    elif config.end != "well":
        ends = {{"value": ValueError, "disk": OSError, "bug": KeyError, "exit": SystemExit}}
        raise ends[config.end](5)


if __name__ == "__main__":
    sys.exit(run(main, user_errors=(OSError,)))
'''

CONF = """
defaults:
  - model: tiny
  - _self_
  - override hydra/hydra_logging: none
  - override hydra/job_logging: none
name: first
end: well
words: []
hydra:
  output_subdir: null
  run: {dir: .}
  sweep: {dir: ., subdir: .}
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a small command with its conf/, the working directory elsewhere."""
    for name, text in {
        "commands/__init__.py": "",
        "commands/go.py": COMMAND.format(root=str(ROOT)),
        "conf/go.yaml": CONF,
        "conf/model/tiny.yaml": "hidden_size: 4\n",
        "conf/model/big.yaml": "hidden_size: 8\n",
        "elsewhere/keep": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "commands" / "go.py"


Command = Callable[..., Result]


@pytest.fixture
def command(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Return a function that runs the command with these arguments inside this process."""
    # `--info` leaves a handler on a stream that capsys closes, and a chatty root logger.
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    monkeypatch.setattr(logging.root, "level", logging.root.level)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [str(project), *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(project), run_name="__main__")
        assert isinstance(stop.value.code, int)
        said = capsys.readouterr()
        return Result(stop.value.code, said.out, said.err)

    return call


def test_a_run_that_ends_well_returns_zero(command: Command) -> None:
    assert command() == Result(0, "job first 4 None\n", "")


def test_overrides_and_groups_reach_the_config(command: Command) -> None:
    assert command("model=big", "name=second").out == "job second 8 None\n"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hiden_size=3", "model.hiden_size: no such key; nearest: model.hidden_size"),
        ("hidden_size=3", "hidden_size: no such key; nearest: model.hidden_size"),
        ("nam=x", "nam: no such key; nearest: name; to add a new key write +nam=x"),
        ("zzz=1", "zzz: no such key; to add a new key write +zzz=1"),
        ("model=bigg", "model=bigg: no such file; nearest: model=big; allowed: big, tiny"),
        ("model.hidden_size=[1", "model.hidden_size=[1: not an override (key=value): no viable"),
        ("name", "name: not an override (key=value): missing EQUAL"),
        ("+name=x", "Could not append to config. An item is already at 'name'."),
        ("model.hidden_size=x", "model.hidden_size: got 'x' (str); allowed: int"),
        ("+model.width=3", "model.width: unknown key, got 3 (int)"),
        ("+model._target_=os.system", "model._target_: got 'os.system' (str)"),
        ("name=${nope}", "name: Interpolation key 'nope' not found"),
        ("end=value", "5 (HYDRA_FULL_ERROR=1 shows where)"),
        ("end=disk", "5"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_code_2(
    command: Command, override: str, said: str
) -> None:
    result = command(override)
    assert result.code == 2
    assert result.err.startswith(f"error: {said}")
    assert result.err.count("\n") == 1


def test_a_missing_primary_config_is_a_mistake_of_the_user(command: Command) -> None:
    result = command("--config-name", "nope")
    assert result.code == 2
    assert result.err.startswith("error: Cannot find primary config 'nope'.")


def test_a_mistake_of_ours_keeps_its_traceback(command: Command) -> None:
    with pytest.raises(KeyError):
        command("end=bug")


def test_the_traceback_is_shown_to_those_who_ask(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    result = command("end=value")
    assert result.code == 2
    assert result.out == "job first 4 1\n"
    assert "Traceback" in result.err
    assert result.err.endswith("error: 5 (HYDRA_FULL_ERROR=1 shows where)\n")


def test_the_environment_is_put_back(command: Command) -> None:
    command("nam=x")
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_recorded_exit_code_is_returned(command: Command) -> None:
    assert command("end=75").code == 75


def test_a_task_may_exit_by_itself(command: Command) -> None:
    assert command("end=exit").code == 5


@pytest.mark.parametrize("verb", [["--cfg", "job"], ["--help"], ["--info", "defaults"]])
def test_verbs_of_hydra_still_work(command: Command, verb: list[str]) -> None:
    result = command(*verb)
    assert result.code == 0
    assert "model" in result.out
    assert "job first" not in result.out


def test_tab_completion_still_works(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "go.py model=")
    monkeypatch.setenv("COMP_POINT", "12")
    result = command("-sc", "query=bash")
    assert result.code == 0
    assert result.out.split() == ["model=big", "model=tiny"]


def test_an_option_that_hydra_does_not_know_is_code_2(command: Command) -> None:
    assert command("--nope").code == 2


def test_a_sweep_names_its_jobs_by_their_overrides(command: Command) -> None:
    result = command("-m", "model=tiny,big", "name=second")
    assert result.code == 0
    assert result.out.splitlines() == [
        "job second/model=tiny 4 None",
        "job second/model=big 8 None",
    ]


def test_a_failed_job_does_not_hide_the_others(command: Command) -> None:
    result = command("-m", "end=value,75,well,disk")
    assert result.code == 75
    assert result.out.count("job first/end=") == 4
    assert result.err.splitlines() == ["error: 5 (HYDRA_FULL_ERROR=1 shows where)", "error: 5"]


def test_a_job_with_a_bug_is_reported_and_the_sweep_goes_on(command: Command) -> None:
    result = command("-m", "end=bug,well")
    assert result.code == 1
    assert result.out.count("job first/end=") == 2
    assert "KeyError: 5" in result.err


def test_a_sweep_with_a_choice_that_does_not_exist_runs_nothing(command: Command) -> None:
    result = command("-m", "model=tiny,bigg")
    assert result.code == 2
    assert "nearest: model=big;" in result.err
    assert result.out == ""


def test_run_wants_a_hydra_main() -> None:
    def plain() -> None: ...

    with pytest.raises(TypeError, match=r"@hydra.main"):
        run(plain)


@pytest.mark.parametrize("code", [-1, 256])
def test_only_exit_codes_are_recorded(command: Command, code: int) -> None:
    result = command(f"end={code}")
    assert result.code == 2
    assert f"exit code: got {code}; allowed: 0 to 255" in result.err


def test_an_exit_code_outside_a_run_is_our_mistake() -> None:
    with pytest.raises(RuntimeError, match="outside"):
        record_exit_code(0)


def test_a_command_that_was_imported_finds_its_conf(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["go"])
    monkeypatch.setattr(sys, "path", [str(project.parents[1]), *sys.path])
    namespace = runpy.run_module("commands.go", run_name="commands.go")
    assert run(namespace["main"]) == 0
    assert capsys.readouterr().out == "job first 4 None\n"


# --- job_name -------------------------------------------------------------------------------------


def test_a_single_run_is_called_by_its_name() -> None:
    assert job_name(OmegaConf.create({"name": "first.2"})) == "first.2"


@pytest.mark.parametrize("name", [None, "", "a/b", "..", ".hidden", "a b", 3, "-x"])
def test_a_name_that_is_no_folder_name_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match=r"^name: got"):
        job_name(OmegaConf.create({"name": name}))


def test_jobs_whose_overrides_are_no_folder_names_stay_apart(command: Command) -> None:
    result = command("-m", "words=[a/b],[a_b]", "end=well")
    names = [line.split()[1] for line in result.out.splitlines()]
    assert [re.sub("-[0-9a-f]{8}$", "", name) for name in names] == 2 * ["first/words=_a_b_"]
    assert names[0] != names[1]


def test_a_job_with_many_overrides_has_a_name_that_a_disk_can_hold(command: Command) -> None:
    words = ",".join(f"word{number}" for number in range(60))
    name = command("-m", f"words=[{words}]").out.split()[1]
    assert name.startswith("first/words=_word0")
    assert len(name) < 200


# --- the shell ------------------------------------------------------------------------------------


def shell(*arguments: str, **environment: str) -> Result:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_command_works_from_any_folder_without_the_folder_of_the_script(project: Path) -> None:
    result = shell(str(project), "model=big", PYTHONSAFEPATH="1")
    assert result == Result(0, "job first 8 None\n", "")


def test_a_command_works_as_a_module(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parents[1])
    result = shell("-m", "commands.go", "hidden_size=8")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: hidden_size: no such key; nearest: model.hidden_size")


def test_a_command_works_under_torchrun(project: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = shell(*launcher, str(project), "name=two", OMP_NUM_THREADS="1")
    assert result.code == 0
    assert result.out.count("job two 4 None") == 2
