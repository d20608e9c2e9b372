"""The script of an element, run by bash: what becomes of signals, codes, nodes and words?"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.slurm_jobs import chain
from tests.launch.slurm_fakes import Fakes, asked, composed_run

FAULTS = "slurm.faults.max_excluded_share=1.0"
SLURM = {
    "SLURM_JOB_ID": "812",
    "SLURM_ARRAY_JOB_ID": "9",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_JOB_NAME": "t-12345678",
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_JOB_END_TIME": "2000000000",
}
CODES = [0, 1, 2, 16, 17, 75, 85, 93]
ENDED = [0, 2, 17, 93]  # docs/run.md: after these nothing is left to do


class Element:
    """One element's script in a folder, with commands of SLURM that are fakes."""

    def __init__(self, folder: Path) -> None:
        """Make the fakes; the run's folder is there, as after an earlier element."""
        self.fakes = Fakes(folder / "bin")
        self.root = folder / "runs"
        self.run = self.root / "t"
        self.run.mkdir(parents=True)
        self.started: list[subprocess.Popen[str]] = []

    def ends_with(self, code: int) -> None:
        """Let the run end with a code in exit.json, and torchrun with 1 as it always does."""
        self.fakes.does("srun", f"echo '{{\"code\": {code}}}' >{self.run}/exit.json; exit 1")

    def start(self, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start the script of a chain, as slurmd would."""
        run = composed_run(self.root, "name=t")
        slurm = asked("slurm.time_limit_s=600", "slurm.margin_s=100", FAULTS, *options).slurm
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", self.fakes.path)  # the script has sbatch's folder on its own PATH
            text = chain(run, words or ("name=t",), slurm=slurm, exclude=()).text
        script = self.root / "script.sh"
        script.write_text(text.replace("readonly POLL_S='5'", "readonly POLL_S='0.1'"))
        started = subprocess.Popen(
            ["bash", str(script)], env={"HOME": "/", "LC_ALL": "C", **SLURM}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.root, start_new_session=True,
        )  # fmt: skip
        self.started.append(started)
        return started

    def end(self) -> None:
        """End what a failed test has left."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def finish(self, *words: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        """Run the script to its end and return its code and what it said."""
        started = self.start(*words, options=options)
        said, _ = started.communicate(timeout=30)
        return started.returncode, said


@pytest.fixture
def element(tmp_path: Path) -> Iterator[Element]:
    element = Element(tmp_path)
    yield element
    element.end()


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("code", CODES)
def test_the_code_is_that_of_exit_json_and_some_end_the_chain(element: Element, code: int) -> None:
    element.ends_with(code)
    assert element.finish()[0] == code
    cancelled = element.fakes.calls("scancel")
    if code in ENDED:
        (words,) = cancelled
        assert {"--name=t-12345678", "--state=PENDING"} <= set(words)
        assert any(word.startswith("--user=") for word in words)
    else:
        assert cancelled == []


def test_what_an_earlier_element_left_is_removed_and_silence_is_85(element: Element) -> None:
    (element.run / "exit.json").write_text('{"code": 0}')
    (element.run / "stop.request").touch()
    element.fakes.does("srun", f"ls {element.run} >{element.root}/seen; exit 1")
    assert element.finish()[0] == 85
    assert "exit.json" not in (element.root / "seen").read_text()
    assert "stop.request" not in (element.root / "seen").read_text()
    assert element.fakes.calls("scancel") == []


@pytest.mark.parametrize("signals", [["USR1"], ["TERM"], ["USR1", "TERM", "USR1"]])
def test_a_signal_becomes_a_request_and_the_step_is_waited_for(
    element: Element, signals: list[str]
) -> None:
    # ends only when the request is there, and would say so if it were signalled itself
    element.fakes.does(
        "srun",
        f"trap 'echo hit >{element.root}/hit' USR1 TERM; touch {element.root}/started\n"
        f"until [[ -e {element.run}/stop.request && -e {element.root}/go ]]; do sleep 0.02; done\n"
        f"echo '{{\"code\": 75}}' >{element.run}/exit.json",
    )
    started = element.start()
    wait_for((element.root / "started").exists)
    for name in signals:
        (element.run / "stop.request").unlink(missing_ok=True)
        os.kill(started.pid, getattr(signal, f"SIG{name}"))
        wait_for((element.run / "stop.request").exists)
        assert started.poll() is None
    (element.root / "go").touch()
    said, _ = started.communicate(timeout=20)
    assert (started.returncode, "the run ended with 75" in said) == (75, True)
    assert not (element.root / "hit").exists()


def test_a_step_that_outlives_its_verdict_is_ended(element: Element) -> None:
    element.fakes.does("srun", f"echo '{{\"code\": 2}}' >{element.run}/exit.json; exec sleep 300")
    begun = time.monotonic()
    code, said = element.finish(options=("slurm.verdict_grace_s=1",))
    assert (code, "ending it" in said) == (2, True)
    assert time.monotonic() - begun < 20
    assert len(element.fakes.calls("scancel")) == 1


def test_a_step_that_is_started_again_after_a_failure_is_left_alone(element: Element) -> None:
    body = f"echo '{{\"code\": 1}}' >{element.run}/exit.json; sleep 2; rm {element.run}/exit.json"
    element.fakes.does("srun", f"{body}; echo '{{\"code\": 0}}' >{element.run}/exit.json")
    code, said = element.finish(options=("slurm.verdict_grace_s=1",))
    assert (code, "ending it" in said) == (0, False)


@pytest.mark.parametrize("given", [True, False])
def test_ranks_are_told_when_the_job_ends_less_the_lead(
    element: Element, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    if not given:
        monkeypatch.delitem(SLURM, "SLURM_JOB_END_TIME")
        monkeypatch.setitem(SLURM, "TZ", "UTC")  # squeue says 2033-05-18T03:33:20, the same second
    element.fakes.does("srun", f'echo "$RUN_DEADLINE_UNIX_S" >{element.root}/told')
    element.finish()
    assert (element.root / "told").read_text() == f"{2_000_000_000 - 100}\n"


def test_without_an_end_the_ranks_are_told_nothing_and_a_person_is(
    element: Element, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(SLURM, "SLURM_JOB_END_TIME")
    element.fakes.does("squeue", "echo N/A")
    element.fakes.does("srun", f'echo "${{RUN_DEADLINE_UNIX_S-unset}}" >{element.root}/told')
    assert "warning: SLURM does not say when this job ends" in element.finish()[1]
    assert (element.root / "told").read_text() == "unset\n"


HOSTILE = (
    "a b", "it's", '"quoted"', "$(touch x)", "`touch x`", "; touch x", "& touch x", "> x", "*",
    "$HOME", "\\", "a\\'b", "--flag", "!!", "~", "#SBATCH --wrap=x", "{1..3}", "",
)  # fmt: skip


def test_words_reach_the_program_as_they_were_written(element: Element) -> None:
    element.finish(*HOSTILE)
    (words,) = element.fakes.calls("srun")
    assert words[-len(HOSTILE) :] == list(HOSTILE)
    assert words[-len(HOSTILE) - 1].endswith("/launch/pretrain.py")
    assert not list(element.root.rglob("x"))


def fail(element: Element, node: str) -> None:
    now = time.time()
    lines = [f'{{"kind": "hang", "node": "{node}", "time_unix_s": {now - ago}}}\n'
             for ago in (7200, 0)]  # fmt: skip
    (element.run / "incidents.jsonl").write_text("".join(lines))


def test_the_worst_of_the_nodes_is_the_spare_one(element: Element) -> None:
    fail(element, "n1")
    two = '+cluster={name:l,num_nodes:2,gpus_per_node:1,gpu_memory_bytes:1,node_link_bytes_per_s:1,network_bytes_per_s:1,time_limit_s:600,time_margin_s:9}'  # fmt: skip # noqa: E501
    run = composed_run(element.root, "name=t", two)
    text = chain(run, (), slurm=asked("slurm.spare_nodes=1", FAULTS).slurm, exclude=()).text
    assert "#SBATCH --nodes=3\n" in text
    script = element.root / "s.sh"
    script.write_text(text)
    environment = {**SLURM, "PATH": element.fakes.path}
    # the script's own PATH is that of a machine with SLURM; here the fakes go before it
    script.write_text(text.replace("export PATH='", f"export PATH='{element.fakes.folder}:"))
    subprocess.run(["bash", str(script)], env=environment, capture_output=True, timeout=30)
    (words,) = element.fakes.calls("srun")
    assert {"--nodelist=n2,n3", "--nodes=2", "--ntasks=2", "--nnodes=2"} <= set(words)
    assert next(word for word in words if "endpoint" in word).split("=")[1].startswith("n2:")


def test_the_next_element_leaves_out_what_has_failed_by_now(element: Element) -> None:
    fail(element, "n2")
    element.ends_with(75)
    _, said = element.finish(options=("slurm.exclude=[n9]",))
    updates = [words for words in element.fakes.calls("scontrol") if words[0] == "update"]
    assert updates == [["update", "JobId=9_1", "ExcNodeList=n9,n2"]]
    assert "leaves out: n9,n2" in said


def test_the_last_element_says_that_nobody_goes_on(element: Element) -> None:
    element.fakes.does("squeue", "exit 1")
    element.ends_with(75)
    code, said = element.finish()
    assert (code, "submit the chain again" in said) == (75, True)
    assert [words for words in element.fakes.calls("scontrol") if words[0] == "update"] == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("body", ["segment.sh", "task.sh"])
def test_shellcheck_finds_nothing_in_a_body(body: str) -> None:
    path = Path(__file__).resolve().parents[2] / "launch" / body
    done = subprocess.run(
        ["shellcheck", "-s", "bash", "-e", "SC2154", str(path)], capture_output=True, text=True
    )
    assert done.stdout == ""
