"""Slots on stages: against the whole model written as one string, and against megatron's reader."""

import itertools

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from parallel.layout import LayoutError
from parallel.stages import megatron_pipeline_layout, stage_slots


def test_sixty_one_layers_stand_four_to_a_stage_on_sixteen() -> None:
    stages = stage_slots(num_layers=61, num_mtp_layers=1, num_stages=16)
    assert [len(stage) for stage in stages] == [4] * 16
    assert (stages[0], stages[1], stages[-1]) == ("Ettt", "tttt", "ttmL")


def test_the_docstrings_example_holds() -> None:
    assert stage_slots(num_layers=4, num_mtp_layers=1, num_stages=2) == ["Ettt", "tmL"]


COMBINATIONS = list(itertools.product(range(1, 13), (0, 1), range(1, 13)))


def test_stages_joined_are_the_model_or_the_combination_is_refused() -> None:
    num_refused = 0
    for num_layers, num_mtp, num_stages in COMBINATIONS:
        model = "E" + "t" * num_layers + "m" * num_mtp + "L"
        try:
            stages = stage_slots(
                num_layers=num_layers, num_mtp_layers=num_mtp, num_stages=num_stages
            )
        except LayoutError:
            num_refused += 1
            # A cut into contiguous stages exists exactly if every other stage gets a slot of what
            # stands before the MTP module and the loss.
            assert num_stages > 1
            assert num_layers + 1 < num_stages - 1 or len(model) < num_stages + num_mtp
            continue
        assert "".join(stages) == model
        assert len(stages) == num_stages
        assert all(stages)
        assert stages[-1].endswith("mL" if num_mtp else "L")
        sizes = [len(stage) for stage in stages[:-1]]
        assert not sizes or max(sizes) - min(sizes) <= 1
    assert 0 < num_refused < len(COMBINATIONS) / 2


def test_too_many_stages_are_refused_by_key() -> None:
    with pytest.raises(LayoutError) as refusal:
        stage_slots(num_layers=4, num_mtp_layers=1, num_stages=8)
    for words in ("layout.pp * layout.vp = 8", "7 slots", "4 layers", "1 MTP", "lower layout.pp"):
        assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("num_layers", "num_mtp", "pp", "vp"),
    [(61, 1, 16, 1), (61, 0, 16, 1), (61, 1, 8, 2), (4, 1, 2, 1), (4, 1, 2, 2), (3, 0, 2, 1)],
)
def test_megatron_reads_the_same_stages(num_layers: int, num_mtp: int, pp: int, vp: int) -> None:
    stages = stage_slots(num_layers=num_layers, num_mtp_layers=num_mtp, num_stages=pp * vp)
    text = megatron_pipeline_layout(stages)
    assert text == "|".join(stages)
    layout = PipelineParallelLayerLayout.from_str(text, pipeline_model_parallel_size=pp)
    layout.validate_layer_layout(num_layers=num_layers, mtp_num_layers=num_mtp)
    names = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
    for number, stage in enumerate(stages):
        read = layout.layout[number % pp][number // pp]
        assert [kind.name for kind in read] == [names[slot] for slot in stage]
