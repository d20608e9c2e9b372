"""What a workload refuses, and what follows from its sizes."""

from dataclasses import replace

import pytest

from parallel.layout import Layout
from pretrain.planner.known_models import KNOWN_MODELS
from pretrain.planner.workload import Recomputed, Workload, even_stages

LLAMA = KNOWN_MODELS["Llama3-70B"]
LAYOUT = Layout(num_ranks=64, tp=4, pp=8, vp=5)
WORKLOAD = Workload(
    architecture=LLAMA,
    layout=LAYOUT,
    stages=even_stages(LLAMA, LAYOUT),
    global_batch_sequences=128,
    sequence_tokens=8192,
    gpu="H100",
)


def test_stages_are_even_where_layers_divide() -> None:
    stages = even_stages(LLAMA, LAYOUT)
    assert (stages[0], stages[1], stages[-1], len(stages)) == ("Ett", "tt", "ttL", 40)
    assert WORKLOAD.rank_stages(7) == ("tt", "tt", "tt", "tt", "ttL")
    assert WORKLOAD.first_layer(8) == 16


def test_embedding_and_loss_count_as_slots_where_layers_do_not_divide() -> None:
    stages = even_stages(KNOWN_MODELS["Llama3.1-405B"], Layout(num_ranks=64, pp=8, vp=8))
    assert {len(slots) for slots in stages} == {2}
    assert (stages[0], stages[-1]) == ("Et", "tL")


def test_batch_and_micro_batch_follow() -> None:
    assert WORKLOAD.num_micro_batches == 64
    assert WORKLOAD.micro_batch_tokens == 8192
    assert WORKLOAD.step_tokens == 128 * 8192


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_batch_sequences": 127}, "global_batch_sequences=127 given; dp"),
        ({"global_batch_sequences": -1}, "global_batch_sequences=-1 given, at least 1"),
        ({"sequence_tokens": 8190}, "sequence_tokens=8190 given; tp"),
        ({"stages": ("E" + "t" * 80 + "L",)}, "pp . vp = 40 stages that together"),
        ({"recipe": "tensorwise"}, "number_format=bf16 with recipe=tensorwise"),
        ({"expert_imbalance": 0.9}, "expert_imbalance=0.9 given"),
        ({"layout": Layout(num_ranks=64, pp=8, vp=5, ep=8)}, "layout.ep=8 given"),
    ],
)
def test_an_impossible_workload_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(WORKLOAD, **changes)  # pyright: ignore[reportArgumentType]


def test_recomputed_modules_belong_to_selective() -> None:
    with pytest.raises(ValueError, match="kind=none with modules"):
        Recomputed(modules=("layernorm",))
