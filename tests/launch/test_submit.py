"""What is asked of SLURM, for which words, and what is refused before SLURM hears of it?"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.compose import run
from launch.config_tree import ConfigError
from launch.pretrain import main as pretrain
from launch.slurm_jobs import chain, tasks
from launch.submission import split_words
from launch.submit import command
from pretrain.monitor.node_faults import FaultPolicy
from pretrain.training.start import USER_ERRORS
from tests.launch.slurm_fakes import Fakes, asked, composed_run, options

Submit = Callable[..., tuple[int, str, str]]
CHAIN = ("slurm.time_limit_s=7200", "name=t")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes(tmp_path / "bin")
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


@pytest.fixture
def submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Submit:
    """Return what runs launch/submit.py here and gives its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        own, given = split_words(words)
        monkeypatch.setattr(sys, "argv", ["submit.py", *own])
        code = run(command(given), user_errors=USER_ERRORS)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_a_chain_asks_for_one_element_after_another_on_the_whole_cluster(submit: Submit) -> None:
    code, script, _ = submit("+cluster=h200_1536", "name=axk1", "--dry-run")
    wanted = options(script)
    assert code == 0
    assert wanted["array"] == "0-39%1"
    assert wanted["dependency"] == "singleton"
    assert wanted["nodes"] == "192"
    assert wanted["gpus-per-node"] == "8"
    assert wanted["ntasks-per-node"] == "1"
    assert wanted["time"] == "4320"  # minutes in three days
    assert wanted["signal"] == "B:USR1@1800"  # nothing measured yet: cluster.time_margin_s
    assert wanted["export"] == "NONE"
    assert {"no-requeue", "exclusive"} <= set(wanted)
    assert wanted["output"].startswith(f"{Path.cwd()}/runs/axk1/slurm/")
    assert "umask 027" in script


def test_on_a_cpu_no_gpu_is_asked_for(submit: Submit) -> None:
    wanted = options(submit(*CHAIN, "slurm.device=cpu", "--dry-run")[1])
    assert not [name for name in wanted if "gpu" in name]
    assert (wanted["nodes"], wanted["cpus-per-task"]) == ("1", "2")  # the demo's two ranks


def test_a_printed_script_is_neither_written_nor_submitted(
    submit: Submit, fakes: Fakes, tmp_path: Path
) -> None:
    for flag in ("--dry-run", "dry_run=true"):
        assert submit(*CHAIN, flag)[0] == 0
    assert fakes.calls("sbatch") == []
    assert not (tmp_path / "runs").exists()


def test_what_is_submitted_is_what_was_printed(
    submit: Submit, fakes: Fakes, tmp_path: Path
) -> None:
    printed = submit(*CHAIN, "--dry-run")[1]
    code, said, _ = submit(*CHAIN)
    assert code == 0
    assert said.startswith("submitted 4711  t-")
    ((*_, path),) = fakes.calls("sbatch")
    assert Path(path) == Path("runs/t/slurm/chain.sh")
    written = tmp_path / path
    assert written.read_text() == printed.removesuffix("\n")
    assert written.stat().st_mode & 0o777 == 0o640


def test_the_warning_comes_a_step_a_validation_a_save_and_a_margin_before_the_end(
    submit: Submit, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "t"
    folder.mkdir(parents=True)
    records = [
        {"step": 1, "step_time_s": 9.5},
        {"step": 2, "step_time_s": 10.0, "loss": 3.0},
        {"step": 2, "checkpoint_save_s": 182.0},
        {"step": 3, "checkpoint_save_s": 40.0, "validation_s": 20.5},
    ]
    text = "".join(f"{json.dumps(record)}\n" for record in records) + '{"step": 4, "chec'
    (folder / "metrics.jsonl").write_text(text)
    wanted = options(submit(*CHAIN, "--dry-run")[1])
    assert wanted["signal"] == "B:USR1@513"  # 10 + 182 + 20.5 + 300, rounded up


def test_two_runs_of_one_name_have_jobs_of_other_names(submit: Submit) -> None:
    first = options(submit(*CHAIN, "--dry-run")[1])["job-name"]
    other = options(submit(*CHAIN, "output_root=else", "--dry-run")[1])["job-name"]
    assert first == options(submit(*CHAIN, "--dry-run")[1])["job-name"]
    assert first != other
    assert first.startswith("t-")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["name=t"], ["slurm.time_limit_s", "cluster.time_limit_s", "null"]),
        (["name=t", "slurm.time_limit_s=300"], ["slurm.time_limit_s", "300 s", "slurm.margin_s"]),
        (["name=t", "slurm.time_limit_s=59"], ["slurm.time_limit_s=59", "60 or more"]),
        ([*CHAIN, "slurm.segments=0"], ["slurm.segments=0", "1 or more"]),
        ([*CHAIN, "slurm.segmnts=3"], ["slurm.segmnts", "slurm.segments"]),
        ([*CHAIN, "slurm.device=tpu"], ["slurm.device", "'tpu'", "gpu"]),
        ([*CHAIN, "slurm.options=[-p x]"], ["slurm.options", "--reservation"]),
        ([*CHAIN, "slurm.partition='a b'"], ["#SBATCH --partition", "'a b'"]),
        ([*CHAIN, "slurm.exclude=['n1;x']"], ["#SBATCH --exclude", "n1;x"]),
        ([*CHAIN, "output_root='a b'"], ["#SBATCH --output", "a b"]),
        ([*CHAIN, "+slurm.environment.WANDB_API_KEY=x"], ["WANDB_API_KEY", "~/.netrc"]),
        ([*CHAIN, "+slurm.environment.A-B=x"], ["slurm.environment", "'A-B'"]),
        ([*CHAIN, "+slurm.environment.A='x\ny'"], ["control character"]),
        ([*CHAIN, "optimizer.lr=-1"], ["optimizer.lr=-1"]),
        ([*CHAIN, "tasks=x"], ["tasks", "job=prepare"]),
        (["job=sweep", *CHAIN], ["job=sweep", "optimizer.lr=1e-3,2e-3"]),
        (["job=prepare", *CHAIN], ["tasks: got null"]),
    ],
)
def test_what_cannot_be_submitted_is_refused_with_its_key(
    submit: Submit, fakes: Fakes, words: list[str], named: list[str]
) -> None:
    code, _, said = submit(*words)
    assert code == 2
    assert all(word in said for word in named), said
    assert fakes.calls("sbatch") == []


@pytest.mark.parametrize(
    "name", ["$(touch x)", "a;b", "a b", "../up", "a/b", "`x`", "'q'", "\xe9", "a" * 129, "a\n", ""]
)
def test_a_name_that_is_more_than_a_name_is_refused(tmp_path: Path, name: str) -> None:
    run = composed_run(tmp_path)
    with pytest.raises(ValueError, match=r"name(=|: got ).*allowed"):
        chain(replace(run, name=name), (), slurm=asked(CHAIN[0]).slurm, exclude=())


@pytest.mark.parametrize("name", ["'$(touch x)'", "'a;b'", "../up"])
def test_such_a_name_never_reaches_slurm(
    submit: Submit, fakes: Fakes, tmp_path: Path, name: str
) -> None:
    code, _, said = submit("slurm.time_limit_s=7200", f"name={name}")
    assert (code, "name: got" in said) == (2, True)
    assert fakes.calls("sbatch") == []
    assert not (tmp_path / "x").exists()


def test_what_slurm_refuses_is_said_in_its_words(submit: Submit, fakes: Fakes) -> None:
    fakes.does("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    code, _, said = submit(*CHAIN)
    assert (code, "invalid partition specified: x" in said) == (2, True)


def test_a_node_that_failed_twice_this_week_is_left_out_and_shown(
    submit: Submit, fakes: Fakes, tmp_path: Path
) -> None:
    past = tmp_path / "runs" / "past"
    past.mkdir(parents=True)
    now = time.time()
    events = [("n2", 7200), ("n2", 0), ("n3", 0), ("gone", 9000), ("gone", 0)]
    lines = [{"kind": "rank_died", "node": n, "time_unix_s": now - ago} for n, ago in events]
    (past / "incidents.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    share = "slurm.faults.max_excluded_share=1.0"

    submit(*CHAIN, share)

    script = (tmp_path / "runs" / "t" / "slurm" / "chain.sh").read_text()
    assert options(script)["exclude"] == "n2"  # sinfo knows no `gone`
    assert json.loads((tmp_path / "runs" / "nodes.json").read_text())["excluded"] == ["n2"]
    code, table, _ = submit("job=nodes", share)
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert (code, "left out" in rows["n2"], "left out" in rows["n3"]) == (0, True, False)


SWEEP = ("job=sweep", "slurm.time_limit_s=7200", "name=s", "optimizer.lr=1e-3,2e-3", "seed=0,1")


def test_a_sweep_has_the_folders_that_hydra_gives_it(
    submit: Submit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = submit(*SWEEP, "slurm.limit=2", "--dry-run")[1]
    # each job of Hydra's own sweep is refused for its corpus, and says so in its folder
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "-m", *SWEEP[2:], "data.corpus=nowhere"])
    assert run(pretrain, user_errors=USER_ERRORS) == 2
    folders = sorted(str(path.parent) for path in (tmp_path / "runs" / "s").glob("*/exit.json"))
    assert len(folders) == 4
    given = words_of(script, "RUN_FOLDERS")
    assert sorted(given) == folders
    wanted = options(script)
    assert wanted["array"] == "0-3%2"
    assert "dependency" not in wanted  # by their common name they would wait for each other
    words, first = words_of(script, "WORDS"), words_of(script, "FIRST_WORDS")
    assert first == ["0", "4", "8", "12", "16"]
    assert words[:4] == [
        "optimizer.lr=0.001", "seed=0", "output_root='runs/s'", "name='optimizer.lr=0.001,seed=0'"
    ]  # fmt: skip


def words_of(script: str, name: str) -> list[str]:
    """Return what bash reads in an array of the settings."""
    settings = script[: script.index("# --- what one element does")]
    done = subprocess.run(
        ["bash", "-c", f'{settings}\nprintf "%s\\0" "${{{name}[@]}}"'], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.split("\0")[:-1]


LIST = """\
# two parts
launch/index_data.py '+pairs.a b.prefixes=[/x/$(touch y)]' part=1/2

launch/index_data.py part=2/2
then launch/index_data.py
"""


def test_tasks_are_an_array_and_the_last_waits_for_all(
    submit: Submit, fakes: Fakes, tmp_path: Path
) -> None:
    (tmp_path / "list").write_text(LIST)
    code, _, _ = submit("job=prepare", "tasks=list", *CHAIN)
    first, last = fakes.calls("sbatch")
    assert code == 0
    assert last[1:] == ["--dependency=afterok:4711", "runs/t/slurm/then.sh"]
    array = (tmp_path / first[-1]).read_text()
    assert options(array)["array"] == "0-1%4"
    assert words_of(array, "WORDS")[1] == "+pairs.a b.prefixes=[/x/$(touch y)]"
    assert options((tmp_path / last[-1]).read_text())["kill-on-invalid-dep"] == "yes"


def test_a_task_is_run_by_our_python_with_its_words(
    submit: Submit, tmp_path: Path, fakes: Fakes
) -> None:
    (tmp_path / "list").write_text(LIST)
    script = submit("job=prepare", "tasks=list", *CHAIN, "--dry-run")[1].split("#!/bin/bash")[1]
    fakes.does("python", "true")
    script = script.replace(f"readonly PYTHON='{sys.executable}'",
                            f"readonly PYTHON='{fakes.folder}/python'")  # fmt: skip
    subprocess.run(["bash", "-c", script], env={"SLURM_ARRAY_TASK_ID": "0"}, check=True)
    ((file, *words),) = fakes.calls("python")
    assert file.endswith("/launch/index_data.py")
    assert Path(file).is_file()
    assert words == ["+pairs.a b.prefixes=[/x/$(touch y)]", "part=1/2"]
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    "text",
    ["", "rm -rf /\n", "launch/train.py\n", "launch/prepare.py 'a\n", "then launch/prepare.py\n",
     "then launch/prepare.py\nlaunch/prepare.py\n", "launch/prepare.py\nthen rm\n"],
)  # fmt: skip
def test_a_list_of_other_commands_is_refused(tmp_path: Path, text: str) -> None:
    (listing := tmp_path / "list").write_text(text)
    with pytest.raises(ConfigError, match=r"tasks=.*list.*allowed"):
        tasks(tmp_path / "t", listing=listing, slurm=asked(CHAIN[0]).slurm)


def test_the_values_in_conf_are_those_of_the_decision() -> None:
    assert asked().slurm.faults == FaultPolicy()


def test_multirun_is_a_job_of_its_own() -> None:
    with pytest.raises(SystemExit, match="job=sweep"):
        split_words(["-m", "seed=0,1"])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("kind", ["chain", "sweep", "tasks"])
def test_shellcheck_finds_nothing_in_a_script(submit: Submit, tmp_path: Path, kind: str) -> None:
    (tmp_path / "list").write_text("launch/prepare.py 'a b' \"it's\" ';$(touch x)'\n")
    words = {
        "chain": (*CHAIN, 'data.corpus="it\'s; $(touch x)"'),
        "sweep": SWEEP,
        "tasks": ("job=prepare", "tasks=list", *CHAIN),
    }[kind]
    script = tmp_path / "script.sh"
    script.write_text(submit(*words, "--dry-run")[1])
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.stdout == ""
