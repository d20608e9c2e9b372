"""Who is silent, and when all stand still, by the reader's clock alone."""

from dataclasses import replace

import pytest

from parallel.beats import LONGEST_WAIT_S, WATCH_ENDED, Ages, Beat, Finding, Phase, Watch
from parallel.groups import TIMEOUT
from pretrain.training.exit_file import INFRASTRUCTURE

WATCH = Watch(interval_s=10.0, hang_s=60.0, slow_hang_s=300.0)
NUM_RANKS = 4


def beat(rank: int, *, count: int, phase: Phase = "step", idle_s: float = 0.0) -> Beat:
    return Beat(
        rank=rank,
        count=count,
        phase=phase,
        step=7,
        idle_s=idle_s,
        patience_s=WATCH.patience_s(phase),
        node=f"n{rank // 2}",
        pid=100 + rank,
    )


def watch_for(
    seconds: float, *, stopped: dict[int, float], left: tuple[int, ...] = ()
) -> tuple[float, Finding] | None:
    """Return when and what a reader finds that looks every 2 s, where ranks beat every 2 s.

    Args:
        seconds: how long it looks.
        stopped: rank -> second of its last beat.
        left: ranks whose last beat says that they ended by themselves.
    """
    ages = Ages(WATCH, now_s=0.0)
    for tenth in range(0, int(seconds * 10), 20):
        now_s = tenth / 10 + 0.7  # the reader looks between beats
        beats: dict[int, Beat] = {}
        for rank in range(NUM_RANKS):
            last_s = min(now_s, stopped.get(rank, now_s))
            has_left = rank in left and now_s > stopped[rank]
            beats[rank] = replace(beat(rank, count=int(last_s / 2)), left=has_left)
        if (found := ages.look(beats, now_s=now_s)) is not None:
            return now_s, found
    return None


@pytest.mark.parametrize("ranks", [(3,), (0,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("last_s", [20.0, 21.9, 35.3])
def test_ranks_whose_beats_stop_are_found_within_two_intervals(
    ranks: tuple[int, ...], last_s: float
) -> None:
    result = watch_for(100, stopped=dict.fromkeys(ranks, last_s))
    assert result is not None
    found_s, finding = result
    assert finding.silent == ranks
    assert WATCH.interval_s < found_s - last_s <= 2 * WATCH.interval_s


def test_ranks_that_beat_are_left_alone() -> None:
    assert watch_for(1000, stopped={}) is None


def test_a_rank_that_has_ended_by_itself_is_not_missed() -> None:
    assert watch_for(100, stopped={2: 20.0}, left=(2,)) is None


def test_a_reader_that_was_held_up_itself_accuses_nobody() -> None:
    ages = Ages(WATCH, now_s=0.0)
    beats = {rank: beat(rank, count=1) for rank in range(NUM_RANKS)}
    assert ages.look(beats, now_s=1.0) is None
    assert ages.look(beats, now_s=50.0) is None  # it did not look for 49 s
    finding = ages.look(beats, now_s=59.0) or ages.look(beats, now_s=65.0)
    assert finding is not None
    assert finding.silent == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("idle_s", "phases", "found"),
    [
        ((61, 70, 80, 90), ("step", "step", "step", "step"), True),
        ((59, 70, 80, 90), ("step", "step", "step", "step"), False),  # one goes on
        ((61, 70, 80, 90), ("step", "step", "save", "step"), False),  # a save may take longer
        ((301, 301, 301, 301), ("save", "data", "start", "evaluation"), True),
        ((61, 70, 80, 90), ("step", "observe", "observe", "step"), True),
    ],
)
def test_a_standstill_is_of_all_ranks_and_longer_than_their_phases_allow(
    idle_s: tuple[float, ...], phases: tuple[Phase, ...], found: bool
) -> None:
    beats = {
        rank: beat(rank, count=1, phase=phase, idle_s=idle)
        for rank, (phase, idle) in enumerate(zip(phases, idle_s, strict=True))
    }
    finding = Ages(WATCH, now_s=0.0).look(beats, now_s=1.0)
    assert finding == (Finding(seconds=min(idle_s)) if found else None)


def test_a_beat_goes_through_the_store_whole() -> None:
    sent = beat(3, count=9, phase="save", idle_s=1.5)
    assert Beat.decode(sent.encode().encode()) == sent


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"interval_s": 0.0}, "watch.interval_s=0.0"),
        ({"interval_s": 300.0}, "watch.interval_s=300.0"),
        ({"hang_s": 5.0}, "watch.hang_s=5.0"),
        ({"slow_hang_s": 600.0}, "slow_hang_s=600.0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key(values: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Watch(**values)


def test_the_watch_and_its_neighbours_agree() -> None:
    assert WATCH_ENDED == INFRASTRUCTURE
    assert TIMEOUT.total_seconds() == LONGEST_WAIT_S
