"""The ledger of activations against saved-tensor hooks on several ranks, pipelines in flight."""

import pytest

from parallel.coordinates import coordinates
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.kernels import Kernels
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.planner.activations import activations
from tests.planner_cases import sizes_of
from tests.pretrain.planner.test_kept import TINY
from tests.saved_tensors import Case, measure

UP_PROJECTION = Recompute(kind="selective", modules=("mla_up_proj", "layernorm"))


def compare(layout: Layout, recompute: Recompute, pool: RankPool) -> None:
    case = Case(
        spec=TINY,
        layout=layout,
        precision=Precision(kind="fp32"),
        recompute=recompute,
        kernels=Kernels(),
        sequence_tokens=128,
        micro_sequences=2,
        num_microbatches=4 if layout.pp > 1 else 1,
    )
    found = pool.run(measure, case)
    for pp in range(layout.pp):
        ranks = [r for r in range(layout.num_ranks) if coordinates(r, layout=layout).pp == pp]
        rows = [row for rank in ranks for row in found[rank].routed]
        mean = round(sum(rows) / len(rows))
        # the ranks of an expert group share the tokens of a moment: their mean is what the ledger
        # takes, not that of peaks, which each may reach with another micro-batch
        moments = zip(*(found[rank].moments for rank in ranks), strict=True)
        counted = max(sum(each) / len(ranks) for each in moments)
        if layout.cp > 1:  # of context ranks the ledger counts the heaviest
            counted = max(found[rank].peak_bytes for rank in ranks)
            mean = round(max(sum(found[rank].routed) for rank in ranks) / len(found[0].routed))
        kept = activations(sizes_of(case, routed_rows=mean), pp).num_bytes
        assert kept == pytest.approx(counted, rel=0.01), (pp, found[ranks[0]].moments)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [Recompute(), UP_PROJECTION, Recompute(kind="full")], ids=str)
def test_two_stages_of_two_expert_ranks_keep_what_hooks_count(
    recompute: Recompute, four_ranks: RankPool
) -> None:
    compare(Layout(num_ranks=4, pp=2, ep=2), recompute, four_ranks)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, ep=2),
        Layout(num_ranks=2, pp=2, vp=2),
        pytest.param(Layout(num_ranks=2, tp=2, etp=2), marks=pytest.mark.slow),
        Layout(num_ranks=2, tp=2, ep=2),
        Layout(num_ranks=2, cp=2, ep=2),
    ],
    ids=str,
)
def test_two_ranks_keep_what_hooks_count(layout: Layout, two_ranks: RankPool) -> None:
    compare(layout, Recompute(), two_ranks)
