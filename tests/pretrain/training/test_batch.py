"""Replicas that cannot share a batch are refused before any of them starts."""

import pytest

from data.stream.curriculum import Curriculum, Stage
from data.stream.order import Segment
from pretrain.training.batch import check_divisible, check_interleaved


def segments(*, sequences: int, ramp_from: int, window_tokens: int = 64) -> tuple[Segment, ...]:
    stage = Stage(
        tokens=100_000,
        window_tokens=window_tokens,
        global_sequences=sequences,
        ramp_from_sequences=ramp_from,
        ramp_tokens=50_000,
    )
    return Curriculum(stages={"only": stage}).timetable().segments


def test_replicas_that_cannot_share_a_size_are_refused_with_the_factors() -> None:
    ramp = segments(sequences=8, ramp_from=4)
    check_divisible(ramp, micro_batch_tokens=128, dp=2)
    said = r"a batch of 4 sequences given.*dp=4 replicas \* 2 sequences.*= 8 must divide"
    with pytest.raises(ValueError, match=said):
        check_divisible(ramp, micro_batch_tokens=128, dp=4)


@pytest.mark.parametrize(
    ("window_tokens", "legal"), [(64, False), (128, False), (256, True), (512, True)]
)
def test_longer_windows_are_fewer_in_a_micro_batch(window_tokens: int, legal: bool) -> None:
    some = segments(sequences=4, ramp_from=2, window_tokens=window_tokens)
    if legal:  # one window, beyond 256 tokens as well
        check_divisible(some, micro_batch_tokens=256, dp=2)
        return
    with pytest.raises(ValueError, match="micro_batch_tokens=256"):
        check_divisible(some, micro_batch_tokens=256, dp=2)


@pytest.mark.parametrize(("pp", "legal"), [(2, True), (3, True), (4, False), (6, True)])
def test_an_interleaved_pipeline_takes_micro_batches_in_rounds(pp: int, legal: bool) -> None:
    ramp = segments(sequences=24, ramp_from=12)
    if legal:
        check_interleaved(ramp, micro_batch_tokens=64, dp=2, pp=pp)  # 6 and 12 micro-batches
        return
    with pytest.raises(ValueError, match=r"= 6 micro-batches.*layout\.pp=4"):
        check_interleaved(ramp, micro_batch_tokens=64, dp=2, pp=pp)
