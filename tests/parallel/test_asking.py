"""Programs and questions that hang, crash or fail: is it said in time, and the rest asked?"""

import os
import sys
import time
from pathlib import Path

import pytest

from parallel.asking import Answer, ask, run_bounded

HANGS, CRASHES, ANSWERS = "signal:pause", "os:abort", "platform:python_version"


def test_the_output_of_a_program_is_its_answer() -> None:
    assert run_bounded(["sh", "-c", "echo one; echo two >&2"], timeout_s=10) == Answer(value="one")


def test_a_program_that_is_not_installed_is_named() -> None:
    answer = run_bounded(["/nowhere/nvidia-smi"], timeout_s=10)
    assert answer == Answer(why_none="nvidia-smi is not installed")


def test_a_program_that_may_not_be_started_is_named(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("no program")
    answer = run_bounded([str(tmp_path / "tool")], timeout_s=10)
    assert answer.value is None
    assert answer.why_none.startswith("tool: ")


def test_a_program_that_fails_says_its_last_line() -> None:
    words = ["sh", "-c", "echo first >&2; echo 'no driver' >&2; exit 9"]
    assert run_bounded(words, timeout_s=10).why_none == "sh failed with exit code 9: no driver"
    words = ["sh", "-c", "kill -SEGV $$"]
    assert run_bounded(words, timeout_s=10).why_none == "sh was killed by signal 11"


def test_a_program_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    begun_s = time.monotonic()
    words = ["sh", "-c", f"tail -f /dev/null & echo $! > {mark}; wait"]
    answer = run_bounded(words, timeout_s=1.0)
    assert answer.why_none == "sh did not answer in 1 s"
    assert time.monotonic() - begun_s < 30  # not for ever; the machine may be busy
    stat = Path(f"/proc/{mark.read_text().strip()}/stat")
    # gone, or dead and not yet buried by whoever adopted it
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_questions_are_answered_in_a_process_of_their_own() -> None:
    questions = [ANSWERS, "os:getpid", 'json:loads {"a b": [1]}']
    answers = ask(questions, timeout_s=60)
    version, pid, loaded = (answers[question] for question in questions)
    assert version == Answer(value=sys.version.split()[0])
    assert pid.value != os.getpid()
    assert loaded == Answer(value={"a b": [1]})


def test_what_a_question_raises_is_why_it_has_no_answer() -> None:
    answers = ask(["json:loads {", "nowhere:at_all", ANSWERS], timeout_s=60)
    assert "Expecting property name" in answers["json:loads {"].why_none
    assert answers["nowhere:at_all"].why_none == "No module named 'nowhere'"
    assert answers[ANSWERS].value


def test_a_question_that_crashes_is_named_and_the_others_are_asked_again() -> None:
    answers = ask(["json:loads 1", CRASHES, ANSWERS, "os:_exit 3", "json:loads 2"], timeout_s=60)
    assert answers[CRASHES].why_none == "abort: was killed by signal 6"
    assert answers["json:loads 1"] == Answer(value=1)
    assert answers["json:loads 2"] == Answer(value=2)
    assert answers[ANSWERS].value


def test_after_the_second_question_that_hangs_nothing_more_is_asked(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # to open it waits for a writer
    begun_s = time.monotonic()
    questions = ["json:loads 1", HANGS, "json:loads 2", f"builtins:open {fifo}", ANSWERS]
    answers = ask(questions, timeout_s=2)
    assert time.monotonic() - begun_s < 60
    assert answers["json:loads 1"] == Answer(value=1)  # known before it hung
    assert answers["json:loads 2"] == Answer(value=2)
    assert answers[HANGS].why_none == "pause: did not answer in 2 s"
    assert answers[ANSWERS].value is None
    assert answers[ANSWERS].why_none.startswith(f"not asked, after open {fifo}: did not answer")


def test_an_interpreter_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    answers = ask([ANSWERS, "os:getpid"], timeout_s=5)
    assert all("not installed" in answer.why_none for answer in answers.values())
    assert len(answers) == 2
