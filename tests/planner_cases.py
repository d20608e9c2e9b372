"""Which step of the planner is a case of tests/saved_tensors.py?"""

from kernels import native
from parallel.stages import stage_slots
from pretrain.planner.architecture import architecture_of
from pretrain.planner.kept import Sizes, balanced_rows
from pretrain.planner.operators import cpu_operators
from pretrain.planner.workload import Recomputed, Workload
from tests.saved_tensors import Case


def workload_of(case: Case) -> Workload:
    """Return the step that the planner is to count."""
    spec, layout, recompute = case.spec, case.layout, case.recompute
    whole = "E" + "t" * spec.num_layers + "m" * spec.num_mtp_layers + "L"
    slots = stage_slots(
        num_layers=spec.num_layers,
        num_mtp_layers=spec.num_mtp_layers,
        num_stages=layout.pp * layout.vp,
    )
    assert case.precision.kind in ("fp32", "bf16")
    return Workload(
        architecture=architecture_of(spec),
        layout=layout,
        stages=tuple(slots) if layout.pp > 1 else (whole,),
        micro_batch_sequences=case.micro_sequences,
        global_batch_sequences=layout.dp * case.micro_sequences * case.num_microbatches,
        sequence_tokens=case.sequence_tokens,
        number_format=case.precision.kind,
        recompute=Recomputed(
            kind=recompute.kind,
            modules=recompute.modules,
            method=recompute.method,
            num_layers=recompute.num_layers,
            loss_chunk_tokens=recompute.loss_chunk_tokens,
        ),
        gpu="cpu",
    )


def sizes_of(case: Case, *, routed_rows: int | None = None) -> Sizes:
    """Return a micro-batch of a case on a CPU rank; None: experts are evenly busy."""
    workload = workload_of(case)
    return Sizes(
        workload=workload,
        operators=cpu_operators(
            workload, dual_norm=case.kernels.dual_norm, is_compiled=native.is_there()
        ),
        routed_rows=balanced_rows(workload) if routed_rows is None else routed_rows,
    )
