"""How is another program, or code that may crash or hang, asked without harm to this process?

A driver that is broken does not answer: `nvidia-smi` hangs, `import torch` hangs, an extension that
was built for another CUDA kills the process that imports it. So each is asked in a process of its
own, which has a limit of time and is left behind if not even SIGKILL ends it.

`python -m parallel.asking FILE QUESTION...` is such a process: it writes an answer after another
into FILE, so that what it knew before it died is not lost, and who asked can see what it died of.
No torch.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.fork_server import prepare_environment
from parallel.spawn import find_function

ROOT = Path(__file__).resolve().parents[1]
_MOST_HANGS = 2
_LAST_WAIT_S = 1.0
"""For a process that was killed; one that waits for a driver may never end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a program or a question gave."""

    value: Any = None
    """JSON values of a question; the output of a program as text; None if there is no answer."""
    why_none: str = ""
    """Why there is no answer, in words; empty: there is one."""


def run_bounded(
    words: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Answer:
    """Return what a program writes to its output; never raises, never waits longer.

    Args:
        words: the program and its arguments.
        timeout_s: seconds it may take, > 0; then it and all that it started are killed.
        environment: its variables; None: this process's.
    """
    name = Path(words[0]).name
    # a file, not a pipe: a grandchild that lives on would keep a pipe open
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            return Answer(why_none=f"{name} is not installed" if missing else f"{name}: {error}")
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return Answer(why_none=f"{name} did not answer in {timeout_s:g} s")
        output.seek(0)
        errors.seek(0)
        text = output.read().decode(errors="replace").strip()
        if code:
            said = (errors.read().decode(errors="replace").strip() or text).splitlines()
            return Answer(why_none=f"{name} {_ended(code)}{': ' + said[-1] if said else ''}")
        return Answer(value=text)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_WAIT_S)
    if process.returncode is None:
        process.returncode = -signal.SIGKILL  # nobody waits for it again, nor warns that it runs


def _ended(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"


def ask(questions: Sequence[str], *, timeout_s: float) -> dict[str, Answer]:
    """Return the answer to each question, from a process of its own.

    A question that kills the process or hangs is left out and the others are asked again. After the
    second that hangs nothing more is asked: what both waited for, the others may wait for as well.

    Args:
        questions: `module:function`, or that, a space, and the one text that it takes; each returns
            JSON values.
        timeout_s: seconds for one process, > 0.
    """
    answers: dict[str, Answer] = {}
    num_hangs = 0
    while left := [question for question in questions if question not in answers]:
        begun, found, ended = _ask_once(left, timeout_s=timeout_s)
        answers.update(found)
        left = [question for question in left if question not in found]
        if not left:
            break
        culprit = left[0]
        num_hangs += "did not answer" in ended
        name = culprit.partition(":")[2].partition("{")[0].strip() if begun else "the interpreter"
        answers[culprit] = Answer(why_none=f"{name}: {ended}")
        if num_hangs == _MOST_HANGS or not begun:
            reason = f"not asked, after {answers[culprit].why_none}"
            answers.update({question: Answer(why_none=reason) for question in left[1:]})
    return answers


def _ask_once(questions: Sequence[str], *, timeout_s: float) -> tuple[bool, dict[str, Answer], str]:
    """Return whether the process came to a question, the answers, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        words = [sys.executable, "-m", "parallel.asking", str(path), *questions]
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        done = run_bounded(words, timeout_s=timeout_s, environment=environment)
        found = {record["question"]: record for record in _records(path)}
    answers = {
        question: Answer(value=record["value"], why_none=record["why_none"])
        for question, record in found.items()
        if "value" in record
    }
    return bool(found), answers, done.why_none.removeprefix(Path(sys.executable).name).strip()


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut off when the process died
            yield json.loads(line)


def _answer_all(path: Path, questions: Sequence[str]) -> None:
    """Answer every question, in the process that may die of it."""
    prepare_environment()
    with path.open("a", encoding="utf-8") as answers:
        for question in questions:
            _write(answers, question=question)
            begun_s = time.monotonic()
            target, _, argument = question.partition(" ")
            try:
                function = find_function(target)
                value, why_none = function(argument) if argument else function(), ""
            except Exception as error:  # whatever it raises is the answer
                value, why_none = None, str(error) or type(error).__name__
            seconds = time.monotonic() - begun_s
            _write(answers, question=question, value=value, why_none=why_none, seconds=seconds)


def _write(file: Any, **record: Any) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


if __name__ == "__main__":
    _answer_all(Path(sys.argv[1]), sys.argv[2:])
