"""A SLURM of one machine, with a configuration of its own, for as long as a `with` lasts.

Everything stands in one temporary folder: key, socket, state, logs. The daemons run in the
foreground as children of this process, so they can be ended by their own handles, and no other
SLURM of the machine is touched. Two nodes of the cluster do not exist: only their names are needed.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "shellcheck")
PACKAGES = ("slurm-wlm", "munge", "shellcheck")
NUM_CPUS = 2
PHANTOM = "phantom1"


class SlurmError(RuntimeError):
    """SLURM is missing, or does not do what every check needs."""


def ensure_installed() -> None:
    """Install what is missing with apt.

    Raises:
        SlurmError: if something is missing and cannot be installed; says what to do.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    os.environ["PATH"] = path
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if not missing:
        return
    command = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() or shutil.which("apt-get") is None:
        raise SlurmError(f"{', '.join(missing)} not found; install them as root: {command}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["apt-get", "update", "-q"], command.split()):
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SlurmError(f"`{' '.join(words)}` failed: {done.stderr[-500:]}")


def configuration(folder: Path, *, node: str) -> str:
    """Return slurm.conf: no cgroups, no accounting, ports that no other SLURM has."""
    return f"""\
ClusterName=check
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=30
NodeName={node} NodeAddr=127.0.0.1 CPUs={NUM_CPUS} RealMemory=2000
NodeName=phantom[1-2] NodeAddr=127.0.0.1 Port=26819 CPUs={NUM_CPUS} State=DOWN
PartitionName=all Nodes={node},phantom[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def local_slurm() -> Iterator[Path]:
    """Yield the folder of a running SLURM; SLURM_CONF leads its commands there.

    Raises:
        SlurmError: if it does not start; shows the end of its logs.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-check-"))
    os.chmod(folder, 0o755)  # munge refuses folders in which others could write
    for name in ("state", "spool"):
        (folder / name).mkdir()
    node = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(configuration(folder, node=node), encoding="utf-8")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munged += [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in
                   ("socket", "pid-file", "seed-file", "log-file")]  # fmt: skip
        daemons.append(_start(munged, folder / "munged.log"))
        wait_until(lambda: (folder / "munge.socket").exists(), seconds=10, what="munged listens")
        daemons.append(_start(["slurmctld", "-D", "-f", str(conf)], folder / "slurmctld.log"))
        daemons.append(_start(["slurmd", "-D", "-f", str(conf), "-N", node], folder / "slurmd.log"))
        wait_until(
            lambda: "idle" in command("sinfo", "-h", "-n", node, "-o", "%T", check=False),
            seconds=60,
            what="the node is idle",
        )
        yield folder
    except SlurmError as error:
        logs = [f"{path.name}:\n{path.read_text('utf-8', 'replace')[-800:]}" for path in
                sorted(folder.glob("*.log"))]  # fmt: skip
        raise SlurmError("\n".join([str(error), *logs])) from error
    finally:
        _end(daemons)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def _start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(words, stdout=stream, stderr=stream, start_new_session=True)


def _end(daemons: list[subprocess.Popen[bytes]]) -> None:
    if len(daemons) == 3:  # no job may outlive the daemon that would end it
        command("scancel", "--user=root", check=False)
        try:
            wait_until(lambda: not jobs(), seconds=45, what="jobs end")
        except SlurmError:
            command("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            time.sleep(2)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def command(*words: str, check: bool = True) -> str:
    """Return what a command of SLURM prints.

    Raises:
        SlurmError: if it fails, unless `check` is false: then what it printed so far.
    """
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if check and done.returncode:
        raise SlurmError(f"`{' '.join(words)}`: {done.stderr.strip()}")
    return done.stdout


def jobs(*options: str) -> dict[str, str]:
    """Return job id -> state of what is queued or runs, elements one by one."""
    text = command("squeue", "-h", "-r", "-o", "%i %T", *options, check=False)
    return {line.split()[0]: line.split()[1] for line in text.splitlines()}


def wait_until(holds: Callable[[], object], *, seconds: float, what: str) -> None:
    """Return as soon as something holds.

    Raises:
        SlurmError: if it does not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SlurmError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.3)
