"""What does a step of a run hold on each stage's GPU, and does it fit there?

A run that is about to start (expectation.py) and a plan of it (forecasts.py) both ask here. No
torch.
"""

from pretrain.planner.hardware import hardware_of
from pretrain.planner.memory import StageMemory, predict_memory
from pretrain.planner.memory_fit import MemoryFit, memory_fit
from pretrain.planner.operators import Operators, own_operators
from pretrain.planner.workload import Workload
from pretrain.training.run import Run


def stage_memory(run: Run, workload: Workload) -> tuple[StageMemory, ...]:
    """Return the memory of each pipeline stage, computed by our operators.

    Args:
        run: chooses the kernels.
        workload: one of its steps.

    Raises:
        ValueError: if the memory of such a step is not known.
    """
    return predict_memory(workload, operators=_operators(run, workload))


def gpu_fit(run: Run, workload: Workload) -> MemoryFit:
    """Return whether a step fits the GPUs of the run's cluster, or of the workload without one.

    Args:
        run: chooses the kernels, the cluster and the reserve.
        workload: one of its steps.

    Raises:
        ValueError: if the memory of such a step is not known.
    """
    cluster = run.cluster
    return memory_fit(
        workload,
        operators=_operators(run, workload),
        memory_bytes=(
            hardware_of(workload.gpu).gpu.memory_bytes
            if cluster is None
            else cluster.gpu_memory_bytes
        ),
        reserved_bytes=run.prediction.reserved_bytes,
    )


def _operators(run: Run, workload: Workload) -> Operators:
    return own_operators(workload, dual_norm=run.kernels.dual_norm)
