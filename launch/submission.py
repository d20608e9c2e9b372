"""How do words of a command line become jobs that SLURM has taken?"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.compose import build, composed
from launch.config_tree import ConfigError
from launch.job_names import job_name, jobs_of_sweep
from launch.slurm_jobs import Job, chain, check_name, sweep, tasks
from launch.slurm_options import Submission
from pretrain.monitor.node_faults import node_table, read_faults, to_exclude, write_nodes
from pretrain.training.run import Run

_OWN = re.compile(r"(job|dry_run|tasks|slurm|hydra)([.=/].*)?", re.DOTALL)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for conf/submit.yaml and those for conf/pretrain.yaml.

    `--dry-run` is `dry_run=true`: Hydra knows no flag but its own.

    Raises:
        SystemExit: with -m, because sweeps are job=sweep here.
    """
    own: list[str] = []
    given: list[str] = []
    for word in words:
        if word in ("-m", "--multirun"):
            raise SystemExit(f"error: {word} given; allowed: job=sweep, one job for all values")
        if word == "--dry-run":
            own.append("dry_run=true")
        elif word.startswith("-") or _OWN.fullmatch(word.lstrip("+~")):
            own.append(word)
        else:
            given.append(word)
    return own, given


def carry_out(asked: Submission, words: Sequence[str]) -> None:
    """Submit the jobs that are asked for, or print them.

    Args:
        asked: what conf/submit.yaml and its words say.
        words: of launch/pretrain.py.

    Raises:
        ValueError: if the configuration is wrong, or SLURM refuses it or is not there.
    """
    if asked.job == "nodes":
        print(_nodes(asked, words))
        return
    jobs = _jobs(asked, words)
    for job in jobs:
        if asked.dry_run:
            print(f"this would be {job.path}:", file=sys.stderr)
            print(job.text)
    if not asked.dry_run:
        _submit(jobs)


def _jobs(asked: Submission, words: Sequence[str]) -> list[Job]:
    if asked.job != "prepare" and asked.tasks is not None:
        raise ConfigError(f"tasks: got {asked.tasks} with job={asked.job}; allowed: job=prepare")
    if asked.job == "prepare":
        if asked.tasks is None:
            raise ConfigError("tasks: got null; allowed with job=prepare: a list of commands")
        cfg = composed("pretrain", words)
        folder = Path(str(cfg.output_root)) / check_name(str(cfg.name))
        return tasks(folder, listing=asked.tasks, slurm=asked.slurm)
    if asked.job == "train":
        cfg = composed("pretrain", words)
        cfg.name = job_name(cfg)
        run = build(Run, cfg)
        return [chain(run, words, slurm=asked.slurm, exclude=_excluded(asked, run))]
    runs: list[Run] = []
    elements: list[list[str]] = []
    parent = Path()
    for folder, element in jobs_of_sweep(words):
        cfg = composed("pretrain", element)
        parent = Path(str(cfg.output_root)) / check_name(str(cfg.name))
        # the same folder that `launch/pretrain.py -m` gives this job
        place = [f"output_root='{parent}'", f"name='{folder}'"]
        elements.append([*(w for w in element if not _is_place(w)), *place])
        runs.append(build(Run, composed("pretrain", elements[-1])))
    exclude = _excluded(asked, runs[0])
    return [sweep(runs, elements, folder=parent, slurm=asked.slurm, exclude=exclude)]


def _is_place(word: str) -> bool:
    return word.partition("=")[0] in ("name", "output_root")


def _excluded(asked: Submission, run: Run) -> list[str]:
    """Return the nodes that have failed too often lately, of those that SLURM has."""
    policy = asked.slurm.faults
    faults = read_faults(run.output_root, policy=policy, now_unix_s=time.time())
    if not faults:
        return []
    num_nodes = 1 if run.cluster is None else run.cluster.num_nodes
    known = [fault.node for fault in faults]
    if not asked.dry_run:  # a script that is only printed may be printed anywhere
        known = _slurm("sinfo", "--noheader", "--Node", "--format=%N").split()
    excluded = to_exclude(faults, policy=policy, known=known, at_most=policy.most(num_nodes))
    if not asked.dry_run:
        write_nodes(run.output_root, faults, excluded=excluded)
    return excluded


def _nodes(asked: Submission, words: Sequence[str]) -> str:
    cfg = composed("pretrain", words)
    root = Path(str(cfg.output_root))
    policy = asked.slurm.faults
    faults = read_faults(root, policy=policy, now_unix_s=time.time())
    num_nodes = int(cfg.cluster.num_nodes) if "cluster" in cfg else len(faults)
    known = [fault.node for fault in faults]
    excluded = to_exclude(faults, policy=policy, known=known, at_most=policy.most(num_nodes))
    return node_table(faults, excluded=excluded)


def _submit(jobs: Sequence[Job]) -> None:
    before = ""
    for job in jobs:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        writing = job.path.with_name(f".{job.path.name}.{os.getpid()}")
        writing.write_text(job.text, encoding="utf-8")
        os.chmod(writing, 0o640)
        os.replace(writing, job.path)
        waits = [f"--dependency=afterok:{before}"] if job.after_ok else []
        # `12;cluster` where there are several clusters
        before = _slurm("sbatch", "--parsable", *waits, str(job.path)).strip().partition(";")[0]
        print(f"submitted {before}  {job.name}  {job.path}")
        print(f"  watch:    squeue --name={job.name}; output beside the script")
        print(f"  stop now: scancel --name={job.name}")


def _slurm(command: str, *words: str) -> str:
    """Return what a command of SLURM prints.

    Raises:
        ConfigError: if it is not there or refuses.
    """
    if shutil.which(command) is None:
        raise ConfigError(f"{command}: not on PATH; allowed: a machine that submits to SLURM")
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"`{' '.join((command, *words))}` refused: {done.stderr.strip()}")
    return done.stdout
