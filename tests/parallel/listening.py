"""Which sockets does a process listen on? Read from /proc, not from torch."""

import os
import stat
from pathlib import Path
from typing import Any

import torch

from parallel.groups import cpu_group


def addresses(pid: int | str) -> set[str]:
    """Return the addresses on which a process listens, as /proc/net writes them in hex."""
    own = {path.stat().st_ino for path in Path(f"/proc/{pid}/fd").iterdir() if path.exists()}
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text("ascii").splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and int(words[9]) in own:
                found.add(words[1].partition(":")[0])
    return found


def exchange() -> None:
    """Make every kind of group that a run has, and use each."""
    values = torch.ones(4)
    torch.distributed.all_reduce(values)
    torch.distributed.all_reduce(values, group=cpu_group("listening"))
    group = torch.distributed.new_group([0, 1], backend="gloo")
    torch.distributed.all_reduce(values, group=group)


def write_addresses(folder: str) -> int:
    """Write what this rank listens on and what its parents do, and which folder it met in."""
    exchange()
    parents = [str(os.getppid()), Path(f"/proc/{os.getppid()}/stat").read_text("ascii").split()[3]]
    lines = {f"rank {address}" for address in addresses("self")}
    lines |= {f"parent {address}" for pid in parents for address in addresses(pid)}
    (Path(folder) / os.environ["RANK"]).write_text("\n".join(sorted(lines)), encoding="ascii")
    torch.distributed.barrier()
    return 0


def meeting_places() -> list[int]:
    """Return the mode of the folder in which lies the file that this rank met the others by."""
    exchange()
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    file = getattr(store, "underlying_store", store)
    return [stat.S_IMODE(Path(file.path).parent.stat().st_mode)]
