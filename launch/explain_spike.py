"""See what was in the batch when a run's loss spiked, and what is to blame.

    python launch/explain_spike.py run=runs/demo
    python launch/explain_spike.py run=runs/demo event=1200 characters=400
    python launch/explain_spike.py run=runs/demo output=spike.json

Of the events of a run (runs/NAME/events, docs/monitor.md) the newest one, or those of a step: what
has happened, the likely cause and why, the sequences with the largest losses, their documents and
text, the steps before, the norms and expert loads that stand out, what the run did about it, and
the command to look further with. Where the recorder could not read the text in time it is read now.

Exit code 2 if there is no such run, or no event of such a step; 0 if the run has had no events.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from data.indexed.atomic import write_bytes
from data.indexed.format import DataError
from data.stream.ledger import Ledger
from launch.compose import Composed, build, run
from launch.inspection import follow_run
from pretrain.monitor.event_bundle import find_bundles, read_bundle, step_of
from pretrain.monitor.event_report import event_text
from pretrain.training.event_text import read_worst, rows_of

_LIMIT_S = 600.0
_NUM_WORST = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Which event is explained.

    Raises:
        ValueError: if there is no such run, or a number is out of range.
    """

    run: Path | None
    """Folder of a run."""
    event: int | str
    """`latest`, or the step of an event."""
    sequences: int
    """Of the worst, with their text."""
    characters: int
    """Of each piece of text that is printed."""
    output: Path | None

    def __post_init__(self) -> None:
        if self.run is None or not self.run.is_dir():
            raise ValueError(f"run={self.run} given; the folder of a run is allowed")
        if isinstance(self.event, str) and self.event != "latest":
            raise ValueError(f"event={self.event} given; latest, or a step is allowed")
        if min(self.sequences, self.characters) < 1:
            raise ValueError(
                f"sequences={self.sequences}, characters={self.characters} given; at least 1 is"
                " allowed"
            )


@hydra.main(version_base=None, config_path="../conf", config_name="explain_spike")
def main(cfg: Composed) -> None:
    """Print what is known of a run's events, and write it where wanted."""
    asked = build(Question, cfg)
    assert asked.run is not None  # refused when built
    bundles = [with_text(asked.run, read_bundle(path)) for path in chosen(asked)]
    for bundle in bundles:
        words = {"sequences": asked.sequences, "characters": asked.characters}
        print(event_text(bundle, folder=str(asked.run), **words) + "\n")
    if not bundles:
        print(f"{asked.run} has had no events: no batch was left out, no loss has spiked")
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(asked.output, (json.dumps(bundles, indent=1) + "\n").encode())


def chosen(asked: Question) -> list[Path]:
    """Return the bundles that are asked for; none if the run has had no events.

    Raises:
        ValueError: if it has had some, but none of the step.
    """
    assert asked.run is not None  # refused when built
    there = find_bundles(asked.run)
    if asked.event == "latest" or not there:
        return there[-1:]
    found = [path for path in there if step_of(path) == asked.event]
    if not found:
        steps = sorted({step_of(path) for path in there})
        raise ValueError(
            f"event={asked.event} given; {asked.run} has events of the steps {steps}, or event="
            "latest is allowed"
        )
    return found


def with_text(folder: Path, bundle: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a bundle with the text that the recorder could not read, if it is there now."""
    if not bundle["text_problem"]:
        return bundle
    try:
        followed = follow_run(folder)
    except (ValueError, DataError) as error:
        return {**bundle, "text_problem": f"{bundle['text_problem']}; now: {error}"}
    assert followed.run is not None, "follow_run gives it"
    # without what was added since: the batch may have been left out
    ledger = Ledger(followed.ledger.entries[: bundle["ledger"]["entries"]])
    rows = rows_of(bundle["sequences"], most=_NUM_WORST)
    worst, problem = read_worst(followed.run, ledger, rows, limit_s=_LIMIT_S)
    return {**bundle, "worst": worst, "text_problem": problem}


if __name__ == "__main__":
    sys.exit(run(main, user_errors=(DataError,)))
