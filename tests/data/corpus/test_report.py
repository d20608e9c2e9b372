"""What is shown of a preparation: sums against the manifest, lines against those by hand."""

import dataclasses

from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.corpus.report import ProgressText, summary


def silent(stage: str, done: int, total: int) -> None:
    """Take no notice."""


def test_the_summary_shows_sums_and_what_is_missing(config: PrepareConfig) -> None:
    manifest = prepare(config, progress=silent)
    sums = [
        sum(files.tokens for files in manifest.splits[split].values()) for split in manifest.splits
    ]

    text = summary(manifest)

    lines = text.splitlines()
    assert [line.split()[1] for line in lines[1:7]] == ["english", "ko.chat", "(all)"] * 2
    assert [line.split()[3] for line in (lines[3], lines[6])] == [f"{count:,}" for count in sums]
    assert len({len(line) for line in lines[:7] if line.startswith("validation")}) == 1
    assert "english: left out 1 undecodable, 1 empty, 1 exact copies" in lines
    assert any(line.startswith("source man (") for line in lines)


def test_the_summary_says_why_a_domain_has_no_validation(config: PrepareConfig) -> None:
    few = {"few": dataclasses.replace(config.sources["korean"], max_documents=5, domain="few")}
    config = dataclasses.replace(
        config, sources={**config.sources, **few}, validation_fraction=0.01
    )

    assert "few: no validation text: " in summary(prepare(config, progress=silent))


def test_progress_is_one_live_line_or_a_line_a_stage() -> None:
    events = [("read", 0, 2), ("read", 1, 2), ("read", 2, 2), ("wait", 0, 0)]
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    live = ProgressText(terminal=True, clock=lambda: next(clock))
    assert [live.text(*event) for event in events] == [
        "\r\x1b[K   1.0 s  read  0/2",
        "\r\x1b[K   2.0 s  read  1/2  1 s left",
        "\r\x1b[K   3.0 s  read  2/2\n",
        "\r\x1b[K   4.0 s  wait",
    ]

    plain = ProgressText(terminal=False, clock=lambda: next(clock))
    assert [plain.text(*event) for event in events] == [
        "",
        "",
        "   3.0 s  read  2/2\n",
        "   4.0 s  wait\n",
    ]


def test_long_work_shows_itself_in_a_log() -> None:
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    plain = ProgressText(terminal=False, clock=lambda: next(clock))
    lines = [plain.text("write", done, 100) for done in (10, 31, 40, 62)]
    assert lines == [
        "",
        "  31.0 s  write  31/100  47 s left\n",
        "",
        "  62.0 s  write  62/100  32 s left\n",
    ]
