"""The stream of windows: against windows cut by hand from the joined documents."""

from pathlib import Path

import numpy as np
import pytest

from data.indexed.format import DataError
from data.indexed.reader import IndexedReader
from data.indexed.writer import IndexedWriter
from data.stream.loader import WindowStream

S = 8
VOCAB = 30_000
NUM_TOKENS = {"beta": 1000, "alpha": 321, "tiny": 5}


def write_domain(prefix: Path, *, first_id: int, num_tokens: int) -> None:
    """One document for every 7 tokens, ids counting up, so that each id says where it stands."""
    with IndexedWriter(prefix, vocab_size=VOCAB) as writer:
        ids = np.arange(first_id, first_id + num_tokens)
        for start in range(0, num_tokens, 7):
            writer.add(ids[start : start + 7])
        writer.finish()


FIRST_ID = {"alpha": 0, "beta": 10_000, "tiny": 20_000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, num_tokens in NUM_TOKENS.items():
        write_domain(tmp_path / name, first_id=FIRST_ID[name], num_tokens=num_tokens)
    return tmp_path


def open_stream(folder: Path, *, seed: int = 0, vocab_size: int = VOCAB) -> WindowStream:
    readers = {name: IndexedReader(folder / name) for name in NUM_TOKENS}
    return WindowStream(readers, window_tokens=S, seed=seed, vocab_size=vocab_size)


def hand_cut() -> list[tuple[int, ...]]:
    windows: list[tuple[int, ...]] = []
    for name in sorted(NUM_TOKENS):
        ids = range(FIRST_ID[name], FIRST_ID[name] + NUM_TOKENS[name])
        windows += [
            tuple(ids[start : start + S + 1])
            for start in range(0, len(ids), S)
            if start + S + 1 <= len(ids)
        ]
    return windows


def test_one_epoch_holds_every_window_exactly_once(folder: Path) -> None:
    with open_stream(folder) as stream:
        windows = stream.windows(0, stream.num_windows)

    assert sorted(map(tuple, windows.tokens.tolist())) == sorted(hand_cut())
    assert windows.tokens.dtype == np.int32
    assert windows.domain_idx.dtype == np.int16


def test_windows_are_counted_by_domain(folder: Path) -> None:
    with open_stream(folder) as stream:
        assert stream.domains == ("alpha", "beta", "tiny")
        assert stream.num_windows_by_domain == {"alpha": 40, "beta": 124, "tiny": 0}
        assert stream.num_windows == 164


def test_each_window_bears_the_domain_it_comes_from(folder: Path) -> None:
    with open_stream(folder) as stream:
        windows = stream.windows(0, 400)

    np.testing.assert_array_equal(windows.domain_idx, windows.tokens[:, 0] // 10_000)


def test_a_sample_is_the_same_however_it_is_asked_for(folder: Path) -> None:
    with open_stream(folder) as stream:
        together = stream.windows(100, 200)
        alone = [stream.windows(100 + number, 1).tokens[0] for number in range(200)]
    with open_stream(folder) as again:
        later = again.windows(250, 50)

    np.testing.assert_array_equal(together.tokens, alone)
    np.testing.assert_array_equal(together.tokens[150:], later.tokens)


def test_the_order_of_the_mapping_is_of_no_consequence(folder: Path) -> None:
    readers = {name: IndexedReader(folder / name) for name in reversed(NUM_TOKENS)}

    with (
        WindowStream(readers, window_tokens=S, seed=0, vocab_size=VOCAB) as other,
        open_stream(folder) as stream,
    ):
        np.testing.assert_array_equal(other.windows(0, 50).tokens, stream.windows(0, 50).tokens)


def test_epochs_and_seeds_have_orders_of_their_own(folder: Path) -> None:
    with open_stream(folder, seed=7) as stream, open_stream(folder, seed=8) as other:
        num_windows = stream.num_windows
        epochs = [stream.windows(epoch * num_windows, num_windows).tokens for epoch in range(3)]
        epochs += [other.windows(epoch * num_windows, num_windows).tokens for epoch in range(2)]

    assert len({tokens.tobytes() for tokens in epochs}) == 5
    for tokens in epochs:
        assert sorted(map(tuple, tokens.tolist())) == sorted(hand_cut())


def test_domains_are_mixed_inside_an_epoch(folder: Path) -> None:
    with open_stream(folder) as stream:
        domain_idx = stream.windows(0, stream.num_windows).domain_idx

    # 40 of 164 are alpha: hypergeometric, 82 draws, mean 20, sd 2.75; five of them allowed.
    assert abs(int(np.sum(domain_idx[:82] == 0)) - 20) < 14


def test_the_fixed_order_takes_evenly_spaced_windows_of_each_domain(folder: Path) -> None:
    with open_stream(folder, seed=1) as stream:
        assert stream.num_sequential(4) == 8
        windows = stream.sequential(0, 8, per_domain=4)

    places = [0, 10, 20, 30, 0, 31, 62, 93]
    first_ids = [place * S for place in places[:4]] + [10_000 + place * S for place in places[4:]]
    np.testing.assert_array_equal(windows.tokens[:, 0], first_ids)
    np.testing.assert_array_equal(windows.domain_idx, [0] * 4 + [1] * 4)


def test_the_fixed_order_can_go_through_everything_in_parts(folder: Path) -> None:
    with open_stream(folder, seed=1) as stream:
        num_windows = stream.num_sequential(10**9)
        parts = [stream.sequential(at, 41, per_domain=10**9).tokens for at in range(0, 164, 41)]

    assert num_windows == 164
    np.testing.assert_array_equal(np.concatenate(parts), hand_cut())


def test_asking_for_nothing_gives_nothing(folder: Path) -> None:
    with open_stream(folder) as stream:
        assert stream.windows(5, 0).tokens.shape == (0, S + 1)


def test_an_id_outside_the_vocabulary_is_named_with_its_place(folder: Path) -> None:
    with (
        open_stream(folder, vocab_size=10_500) as stream,
        pytest.raises(DataError, match=r"domain 'beta', document 71, position 3: id 10500"),
    ):
        stream.sequential(0, 164, per_domain=10**9)  # 10500 is token 500 of beta: 71 * 7 + 3


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, -1)])
def test_negative_numbers_are_refused(folder: Path, first: int, count: int) -> None:
    with open_stream(folder) as stream, pytest.raises(ValueError, match="must be >= 0"):
        stream.windows(first, count)


def test_a_fixed_order_is_not_read_past_its_end(folder: Path) -> None:
    with open_stream(folder) as stream:
        with pytest.raises(ValueError, match=r"windows 6 \.\. 9 of 8"):
            stream.sequential(6, 3, per_domain=4)
        with pytest.raises(ValueError, match="per_domain=0"):
            stream.num_sequential(0)


def test_domains_too_short_for_one_window_are_refused(folder: Path) -> None:
    readers = {"tiny": IndexedReader(folder / "tiny")}

    with pytest.raises(DataError, match=r"one window of 8 \+ 1 tokens: \{'tiny': 5\}"):
        WindowStream(readers, window_tokens=S, seed=0, vocab_size=VOCAB)

    readers["tiny"].close()


@pytest.mark.parametrize(
    ("key", "value"), [("window_tokens", 0), ("vocab_size", 0), ("readers", {})]
)
def test_numbers_that_make_no_stream_are_refused(folder: Path, key: str, value: object) -> None:
    with IndexedReader(folder / "alpha") as reader:
        arguments = {"readers": {"alpha": reader}, "window_tokens": S, "seed": 0, "vocab_size": 9}

        with pytest.raises(ValueError, match="allowed"):
            WindowStream(**{**arguments, key: value})  # type: ignore[arg-type]
