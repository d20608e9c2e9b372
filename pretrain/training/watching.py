"""What does a run do when a rank hangs, or holds the others up?

parallel/watch.py finds the rank; here it becomes one incident and an `exit.json`, before every rank
ends with 85. The trainer says what it is doing (`enter`), from which also follow the three times of
each step: waiting for data, computing, waiting in collectives. Every `console_interval_steps` the
ranks gather them, one collective of some hundred numbers, and rank 0 names stragglers
(pretrain/monitor/stragglers.py).
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from parallel.beats import Phase
from parallel.groups import stage_rank
from parallel.recorder import WAIT_KINDS, host_waits
from parallel.reduce import gather_over_all
from parallel.watch import RankWatch, Report, watched_ranks
from pretrain.checkpoint.lease import incident_mark
from pretrain.monitor.incidents import Incident, record_incident, this_node
from pretrain.monitor.stragglers import StragglerWatch
from pretrain.training.exit_file import INFRASTRUCTURE, write_exit
from pretrain.training.hang import incident_of
from pretrain.training.run import Run

HANG_FOLDER = "hang"
WAIT_METRICS = ("all_to_all_s", "pipeline_wait_s", "collective_wait_s")
"""Names of the times of WAIT_KINDS."""


class RunWatch:
    """What the main thread of a rank says, and the times of its steps."""

    def __init__(self, run: Run, own: RankWatch) -> None:
        """Begin in the phase `start`.

        Args:
            run: the configuration.
            own: this rank's thread.
        """
        self._run, self._own = run, own
        self._phase: Phase = "start"
        self._since_s, self._waited_s = time.perf_counter(), dict(own.waits.by_kind_s)
        self._data_s = self._step_s = 0.0
        self._wait_s = dict.fromkeys(WAIT_KINDS, 0.0)
        self._rows: list[tuple[float, ...]] = []
        self._stragglers: StragglerWatch | None = None

    def enter(self, phase: Phase, step: int) -> None:
        """Say what this rank does from now on.

        Args:
            phase: what.
            step: optimizer steps done.
        """
        self._own.enter(phase, step)
        now_s, waited_s = time.perf_counter(), dict(self._own.waits.by_kind_s)
        if self._phase == "data":
            self._data_s += now_s - self._since_s
        elif self._phase == "step":
            self._step_s += now_s - self._since_s
            for kind in WAIT_KINDS:
                self._wait_s[kind] += waited_s[kind] - self._waited_s[kind]
        self._phase, self._since_s, self._waited_s = phase, now_s, waited_s

    def step_done(self, step: int, *, device: torch.device) -> dict[str, float]:
        """Keep the times of a step; collective every `console_interval_steps`.

        Args:
            step: optimizer steps done.
            device: of the tensor that is gathered.

        Returns:
            Then the times of the step that was just done, of its slowest rank, as metrics.
        """
        waits_s = tuple(self._wait_s.values())
        self._rows.append((self._data_s, max(self._step_s - sum(waits_s), 0.0), *waits_s))
        self._data_s = self._step_s = 0.0
        self._wait_s = dict.fromkeys(WAIT_KINDS, 0.0)
        if step % self._run.telemetry.console_interval_steps:
            return {}
        times_RNP = gather_over_all(torch.tensor(self._rows, dtype=torch.float32, device=device))
        self._rows = []
        if self._stragglers is None:
            stages_R1 = gather_over_all(torch.tensor([stage_rank()], device=device))
            self._stragglers = StragglerWatch(
                self._run.stragglers, peers=stages_R1.flatten().tolist()
            )
        times_RNP = times_RNP.cpu()
        if torch.distributed.get_rank() == 0:
            parts_RNP = torch.cat([times_RNP[..., :2], times_RNP[..., 2:].sum(-1, True)], dim=-1)
            self._name_stragglers(self._stragglers, parts_RNP, step=step)
        data_s, _compute_s, *waits_s = times_RNP[:, -1].amax(0).tolist()
        waited = dict(zip(WAIT_METRICS, waits_s, strict=True)) if host_waits() else {}
        return {"data_wait_s": data_s, **waited}

    def _name_stragglers(
        self, stragglers: StragglerWatch, times_RNP: torch.Tensor, *, step: int
    ) -> None:
        times_NRP = times_RNP.double().numpy().transpose(1, 0, 2)
        for found in stragglers.add(times_NRP, last_step=step):
            node = self._own.node_of(found.rank)
            text = (
                f"rank {found.rank} on {node} holds up the others: its {found.part} takes"
                f" {found.excess_s:.3f} s longer than its peers' in {found.num_late} of the last"
                f" {self._run.stragglers.window_steps} steps of {found.step_s:.3f} s; the run goes"
                " on"
            )
            record_incident(
                self._run.folder,
                Incident(
                    kind="straggler",
                    text=text,
                    step=step,
                    rank=found.rank,
                    node=node,
                    detail=asdict(found),
                ),
            )


@contextmanager
def watching(run: Run, *, attempt: Callable[[], int | None]) -> Generator[RunWatch]:
    """Yield this rank's watch; a hang ends the process with 85, and is recorded once.

    Args:
        run: the configuration.
        attempt: which start of the run this is, None before that is known.

    Collective: every rank enters, and leaves unless it raises.
    """

    def report(found: Report) -> None:
        number = attempt()
        mark = None if number is None else incident_mark(run.folder, number)
        incident = replace(incident_of(found), attempt=number)
        record_incident(run.folder, incident, mark=mark)
        write_exit(run.folder, code=INFRASTRUCTURE, reason=incident.text, step=incident.step)

    root = run.folder / HANG_FOLDER
    with watched_ranks(run.watch, root=root, node=this_node(), report=report) as own:
        yield RunWatch(run, own)
