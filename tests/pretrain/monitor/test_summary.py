import pytest

from pretrain.monitor.summary import RunSummary, TextScore, summary_table


def make(**changes: object) -> RunSummary:
    fields: dict[str, object] = {
        "name": "tiny",
        "step": 600,
        "total_steps": 600,
        "num_tokens": 9_830_400,
        "train_loss": 3.21,
        "vocabulary_size": 16384,
        "tokens_per_s": 12345.6,
        "achieved_flop_per_s": 45.2e9,
        "elapsed_s": 845.0,
        **changes,
    }
    return RunSummary(**fields)  # type: ignore[arg-type]


def full() -> RunSummary:
    return make(
        first_train_loss=9.71,
        validation=TextScore(
            name="all", loss=3.3, bits_per_byte=1.1, gzip_bits_per_byte=2.7, xz_bits_per_byte=2.2
        ),
        domains=[TextScore(name="ko", loss=3.9, bits_per_byte=1.3), TextScore(name="en", loss=3.4)],
        mfu=0.431,
        memory_peak_bytes=1610612736,
        precision="fp8 hybrid tensorwise, emulated",
        places={"metrics": "runs/tiny/metrics.jsonl", "plot": "runs/tiny/run.png"},
        next_commands=["python launch/a.py", "python launch/b.py", "python launch/c.py"],
    )


def find_row(table: str, label: str) -> list[str]:
    return next(line.split() for line in table.splitlines() if line.split()[:1] == [label])


def test_the_validation_row_stands_beside_gzip_and_xz():
    row = find_row(summary_table(full()), "validation")
    # 3.3 / ln(16384) = 0.340; 1 - 1.1 / 2.2 = 50%
    assert row == ["validation", "3.3000", "0.340", "1.100", "2.700", "2.200", "50%"]


def test_what_was_not_measured_is_a_dash():
    assert find_row(summary_table(full()), "en") == ["en", "3.4000", "0.350", "-", "-", "-", "-"]


def test_the_loss_columns_are_aligned():
    lines = summary_table(full()).splitlines()
    start = next(i for i, line in enumerate(lines) if "nats/token  of ln(V)" in line)
    assert len({len(line) for line in lines[start : start + 6]}) == 1


def test_speed_place_and_next_commands_are_listed():
    table = summary_table(full())
    for text in (
        "9,830,400",
        "0:14:05",
        "12,346",
        "45.2 GFLOP/s, MFU 43.1%",
        "1.50 GiB",
        "runs/tiny/run.png",
        "python launch/c.py",
    ):
        assert text in table


def test_a_run_without_validation_has_no_empty_columns():
    table = summary_table(make(tokens_per_s=None, achieved_flop_per_s=None))
    assert "gzip" not in table
    assert "where things are" not in table


def test_a_stopped_run_says_so():
    assert summary_table(make(step=300)).startswith("tiny: stopped at step 300 of 600\n")


def test_the_table_is_plain_ascii_without_trailing_blanks():
    table = summary_table(full())
    assert table.isascii()
    assert all(line == line.rstrip() for line in table.splitlines())


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", -1), ("num_tokens", -1), ("total_steps", 0), ("vocabulary_size", 1)],
)
def test_nonsense_is_refused_by_key(key: str, value: int):
    with pytest.raises(ValueError, match=key):
        make(**{key: value})
