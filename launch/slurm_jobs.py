"""Which jobs are asked of SLURM, with which resources and limits?

A chain is one array whose elements follow one another; each goes on where the one before has saved
(docs/decisions/0022). A sweep and a list of tasks are arrays, too. Nothing here talks to SLURM.
"""

import hashlib
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch.config_tree import ConfigError
from launch.slurm_options import MOST_ELEMENTS, SlurmOptions
from launch.slurm_script import flattened, script
from pretrain.training.exit_file import ENDS_JOB, INFRASTRUCTURE, STOPS_CHAIN
from pretrain.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
TASK_COMMANDS = ("launch/prepare.py", "launch/index_data.py", "launch/inspect_data.py")
_POLL_S = 5
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One script to submit."""

    name: str
    """As SLURM knows it."""
    path: Path
    """Where the script is kept."""
    text: str
    after_ok: bool = False
    """Whether it waits until every element of the job before it has ended with 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one run needs: nodes, and how long it may have them."""

    num_nodes: int
    ranks_per_node: int
    time_limit_s: int
    lead_s: int
    """So long before the limit the run is asked to stop."""
    whole_nodes: bool
    """Whether nobody else may use its nodes."""
    measured: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds on which `lead_s` rests; empty: the configuration's."""


def check_name(name: str) -> str:
    """Return a run's name that can be a job's.

    Raises:
        ConfigError: if it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name: got {name!r}; allowed: 1 to 128 of A-Z a-z 0-9 . _ -")
    return name


def slurm_name(folder: Path, name: str) -> str:
    """Return a name that no other run has: `--dependency=singleton` goes by it."""
    return f"{name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


def measured_times(folder: Path) -> dict[str, float]:
    """Return the longest step, validation and save of a run in s; empty before its first save.

    Args:
        folder: the run's; `metrics.jsonl` may be missing, and its last line cut.
    """
    path = folder / "metrics.jsonl"
    longest: dict[str, float] = {}
    if not path.exists():
        return longest
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut by a full disk or a kill
            for key in ("step_time_s", "validation_s", "checkpoint_save_s"):
                if isinstance(value := record.get(key), int | float) and math.isfinite(value):
                    longest[key] = max(longest.get(key, 0.0), float(value))
    return longest if "checkpoint_save_s" in longest else {}


def resources(run: Run, slurm: SlurmOptions) -> Resources:
    """Return what a run needs.

    The run is warned a step, a validation, a save and `slurm.margin_s` before its time is over, as
    measured so far; before the first save `cluster.time_margin_s` before it.

    Raises:
        ConfigError: if no time limit is given, or nothing of it is left before the warning.
    """
    cluster = run.cluster
    limit_s = slurm.time_limit_s or (None if cluster is None else cluster.time_limit_s)
    if limit_s is None:
        raise ConfigError(
            "slurm.time_limit_s and cluster.time_limit_s: got null; allowed: the seconds that one"
            " element of the chain may have, in one of the two"
        )
    times = measured_times(run.folder)
    first = slurm.margin_s if cluster is None else cluster.time_margin_s
    lead_s = math.ceil(sum(times.values()) + slurm.margin_s) if times else first
    minutes = limit_s // 60
    if minutes < 1 or lead_s >= minutes * 60:
        given = ", ".join(f"{key} {value:.0f} s" for key, value in times.items()) or "none yet"
        raise ConfigError(
            f"slurm.time_limit_s: {minutes} whole minutes; allowed: more than the {lead_s} s before"
            f" its end at which the run is asked to save (measured: {given}; slurm.margin_s="
            f"{slurm.margin_s})"
        )
    return Resources(
        num_nodes=1 if cluster is None else cluster.num_nodes,
        ranks_per_node=run.layout.num_ranks if cluster is None else cluster.gpus_per_node,
        time_limit_s=minutes * 60,
        lead_s=lead_s,
        whole_nodes=slurm.device == "gpu" and cluster is not None,
        measured=times,
    )


def chain(run: Run, words: Sequence[str], *, slurm: SlurmOptions, exclude: Sequence[str]) -> Job:
    """Return the chain that trains one run to its end.

    Args:
        run: the configuration that `words` make.
        words: of launch/pretrain.py.
        slurm: what else is asked.
        exclude: nodes that the first element leaves out; each element finds those of the next.

    Raises:
        ConfigError: if the name, a folder or an option cannot stand in a script.
    """
    name = slurm_name(run.folder, check_name(run.name))
    needs = resources(run, slurm)
    own = {
        "job-name": name,
        "array": f"0-{slurm.segments - 1}%1",
        "dependency": "singleton",
        **_for_runs(needs, slurm, num_nodes=needs.num_nodes + slurm.spare_nodes),
    }
    if left_out := [*slurm.exclude, *exclude]:
        own["exclude"] = ",".join(dict.fromkeys(left_out))
    folder = run.folder / "slurm"
    text = script(
        {**own, **_common(slurm, folder)},
        environment=_environment(slurm),
        settings={
            "IS_CHAIN": 1,
            "RUN_FOLDERS": [str(run.folder.resolve())],
            **flattened([words]),
            **_settings(run.output_root, needs, slurm),
        },
        body="segment.sh",
    )
    return Job(name=name, path=folder / "chain.sh", text=text)


def sweep(
    runs: Sequence[Run],
    words: Sequence[Sequence[str]],
    *,
    folder: Path,
    slurm: SlurmOptions,
    exclude: Sequence[str],
) -> Job:
    """Return one array whose elements train a run each.

    Args:
        runs: the configurations, all with the same resources.
        words: of launch/pretrain.py, for each.
        folder: of the sweep.
        slurm: what else is asked.
        exclude: nodes to leave out.

    Raises:
        ConfigError: as `chain`, and if the runs need unlike resources or are too many.
    """
    name = slurm_name(folder, check_name(folder.name))
    needs = [resources(run, slurm) for run in runs]
    sizes = {(one.num_nodes, one.ranks_per_node) for one in needs}
    if len(sizes) > 1 or len(runs) > MOST_ELEMENTS:
        raise ConfigError(
            f"job=sweep: {len(runs)} runs on {sorted(sizes)} (nodes, ranks of a node); allowed: up"
            f" to {MOST_ELEMENTS}, all on as many"
        )
    longest = max(needs, key=lambda one: one.lead_s)
    own = {
        "job-name": name,
        "array": f"0-{len(runs) - 1}%{slurm.limit}",
        **_for_runs(longest, slurm, num_nodes=longest.num_nodes),
    }
    if left_out := [*slurm.exclude, *exclude]:
        own["exclude"] = ",".join(dict.fromkeys(left_out))
    text = script(
        {**own, **_common(slurm, folder / "slurm")},
        environment=_environment(slurm),
        settings={
            "IS_CHAIN": 0,
            "RUN_FOLDERS": [str(run.folder.resolve()) for run in runs],
            **flattened(words),
            **_settings(folder, longest, slurm),
        },
        body="segment.sh",
    )
    return Job(name=name, path=folder / "slurm" / "sweep.sh", text=text)


def tasks(folder: Path, *, listing: Path, slurm: SlurmOptions) -> list[Job]:
    """Return an array with one element for each line of a list, and what comes after all of them.

    A line is a command as `launch/index_data.py output=... part=1/8`; lines that are empty or begin
    with # are left out. The last one may begin with `then`: it waits for the others.

    Args:
        folder: where the scripts are kept.
        listing: the list.
        slurm: what else is asked.

    Raises:
        ConfigError: if the list is missing, empty or too long, or a line is no such command.
    """
    if slurm.time_limit_s is None:
        raise ConfigError("slurm.time_limit_s: got null; allowed: the seconds that a task may have")
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"tasks={listing}: {error}; allowed: a list of commands") from error
    commands = [
        _command(line, f"tasks={listing}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    first = [words for words in commands if words[0] != "then"]
    last = [words[1:] for words in commands if words[0] == "then"]
    if (
        not 1 <= len(first) <= MOST_ELEMENTS
        or len(last) > 1
        or (last and commands[-1][0] != "then")
    ):
        raise ConfigError(
            f"tasks={listing}: {len(first)} tasks, {len(last)} lines with `then`; allowed: 1 to"
            f" {MOST_ELEMENTS} tasks, and one `then` as the last line"
        )
    name = slurm_name(folder, check_name(folder.name))
    array = {"array": f"0-{len(first) - 1}%{slurm.limit}"}
    jobs = [_task_job(first, name=name, folder=folder, slurm=slurm, own=array)]
    if last:
        # the job goes away if a task fails, instead of waiting for ever
        own = {"kill-on-invalid-dep": "yes"}
        jobs.append(_task_job(last, name=f"{name}-then", folder=folder, slurm=slurm, own=own))
    return jobs


def _command(line: str, at: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"{at}: {error}; allowed: words as a shell takes them") from error
    named = words[1:2] if words[0] == "then" else words[:1]
    if not named or named[0] not in TASK_COMMANDS:
        raise ConfigError(f"{at}: got {line!r}; allowed: one of {', '.join(TASK_COMMANDS)}")
    return words


def _task_job(
    commands: Sequence[Sequence[str]],
    *,
    name: str,
    folder: Path,
    slurm: SlurmOptions,
    own: dict[str, str],
) -> Job:
    assert slurm.time_limit_s is not None  # refused by the caller
    needs = {
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": str(slurm.cpus_per_task),
        "time": str(slurm.time_limit_s // 60),
    }
    text = script(
        {"job-name": name, **own, **needs, **_common(slurm, folder / "slurm")},
        environment=_environment(slurm),
        settings={"ROOT": str(ROOT), "PYTHON": sys.executable, **flattened(commands)},
        body="task.sh",
    )
    kind = "then" if name.endswith("-then") else "tasks"
    return Job(name=name, path=folder / "slurm" / f"{kind}.sh", text=text, after_ok=kind == "then")


def _for_runs(needs: Resources, slurm: SlurmOptions, *, num_nodes: int) -> dict[str, str]:
    asked = {
        "nodes": str(num_nodes),
        "ntasks-per-node": "1",
        "time": str(needs.time_limit_s // 60),
        "signal": f"B:USR1@{needs.lead_s}",
    }
    if slurm.device == "gpu":
        asked["gpus-per-node"] = str(needs.ranks_per_node)
    else:
        asked["cpus-per-task"] = str(needs.ranks_per_node)
    if needs.whole_nodes:
        asked["exclusive"] = ""
    return asked


def _common(slurm: SlurmOptions, folder: Path) -> dict[str, str]:
    chosen = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
    }
    options = {name: value for name, value in chosen.items() if value is not None}
    for option in slurm.options:
        name, _, value = option.removeprefix("--").partition("=")
        options[name] = value
    return {
        "no-requeue": "",
        "export": "NONE",
        "chdir": str(Path.cwd()),
        "output": f"{folder.resolve()}/%x_%A_%a.out",
        **options,
    }


def _environment(slurm: SlurmOptions) -> dict[str, str]:
    """Return the variables of a job: where programs are, and what the user has named."""
    places = [str(Path(sys.executable).parent)]
    if sbatch := shutil.which("sbatch"):
        places.append(str(Path(sbatch).parent))
    places += ["/usr/local/bin", "/usr/bin", "/bin"]
    return {"PATH": ":".join(dict.fromkeys(places)), **slurm.environment}


def _settings(
    output_root: Path, needs: Resources, slurm: SlurmOptions
) -> dict[str, str | int | list[int]]:
    return {
        "ROOT": str(ROOT),
        "PYTHON": sys.executable,
        "OUTPUT_ROOT": str(output_root.resolve()),
        "NUM_NODES": needs.num_nodes,
        "RANKS_PER_NODE": needs.ranks_per_node,
        "MAX_RESTARTS": slurm.max_restarts,
        "LEAD_S": needs.lead_s,
        "VERDICT_GRACE_S": slurm.verdict_grace_s,
        "POLL_S": _POLL_S,
        "FAULT_POLICY": json.dumps(asdict(slurm.faults)),
        "MAX_EXCLUDED": slurm.faults.most(needs.num_nodes),
        "EXCLUDED": ",".join(slurm.exclude),
        "STOPS_CHAIN": sorted(STOPS_CHAIN),
        "ENDS_JOB": sorted(ENDS_JOB),
        "INFRASTRUCTURE": INFRASTRUCTURE,
    }
