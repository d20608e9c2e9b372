"""Documents of noise in the text: named by the flight recorder, left out, and soon forgotten.

`noisy_corpus` is the corpus of all tests with a row of documents behind it that hold random signs,
under the tokenizer of that corpus, so that losses compare.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.corpus.manifest import TOKENIZER_NAME
from data.stream.curriculum import Curriculum, Stage
from data.stream.ledger import read_ledger
from pretrain.monitor.event_bundle import find_bundles, read_bundle
from pretrain.monitor.records import read_metrics
from pretrain.training.change import Change
from pretrain.training.recovery import Recovery
from pretrain.training.rewind import read_rewinds
from pretrain.training.run import CheckpointPolicy, Run
from tests.chaos.oracles import read_incidents, truth_of, wrong_losses, wrong_state
from tests.chaos.play import play
from tests.chaos.scenario import Scenario
from tests.chaos.test_spikes import GARBAGE, GROWN, RULE
from tests.tiny_corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
NUM_NOISY = 8
NOISY = {f"{number}.txt" for number in range(120, 120 + NUM_NOISY)}
MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def noisy_corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny corpus with documents of noise in it."""
    folder = tmp_path_factory.mktemp("noisy")
    return write_corpus(folder, num_noisy=NUM_NOISY, tokenizer=tiny_corpus / TOKENIZER_NAME)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return what makes a run on two replicas that begins to judge at step 10.

    With this seed the first two batches with a document of noise are 13 and 19.
    """

    def make(
        name: str,
        corpus: Path,
        *,
        steps: int,
        policy: str = "skip",
        **words: Any,
    ) -> Run:
        stage = Stage(tokens=steps * 4 * 64, window_tokens=64, global_sequences=4)
        recovery: Any = {"margin_steps": 5, "max_skipped_batches": 12, "rule": RULE, **words}
        return replace(
            Scenario(layout="dp2").run(tmp_path, corpus=corpus, name=name),
            seed=2,
            curriculum=Curriculum(stages={"only": stage}, max_epochs=100.0),
            recovery=Recovery(policy=policy, **recovery),  # pyright: ignore[reportArgumentType]
            checkpoints=CheckpointPolicy(interval_steps=4, keep=2, read_back=1.0),
        )

    return make


def bundles_of(run: Run) -> list[dict[str, Any]]:
    return [read_bundle(path) for path in find_bundles(run.folder)]


def left_out(run: Run) -> list[int]:
    return [batch for part in read_ledger(run.folder / "ledger.jsonl").skipped() for batch in part]


def worst_places(bundle: dict[str, Any]) -> set[str]:
    """Return the files of the documents in the worst sequence of an event."""
    return {piece["place"] for piece in bundle["worst"][0]["pieces"]}


def test_a_document_of_noise_is_named_and_its_batch_left_out(
    make_run: MakeRun, noisy_corpus: Path
) -> None:
    """The oracle is the text itself: the name of the file that the noise was written to."""
    run = play(make_run("noisy", noisy_corpus, steps=16)).run
    (bundle,) = bundles_of(run)
    assert bundle["kind"] == "skip"
    assert left_out(run) == [bundle["batch"]] == [13]
    assert worst_places(bundle) <= NOISY
    assert bundle["cause"]["kind"] == "data"
    assert bundle["rerun"]["verdict"] == "same again"
    (incident,) = read_incidents(run.folder)
    detail: Any = incident["detail"]
    assert (run.folder / detail["bundle"]).is_file()
    assert detail["cause"] == "data"
    words = ["launch/explain_spike.py", f"run={run.folder}", "sequences=1"]
    told = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "likely cause: data" in told.stdout
    assert worst_places(bundle).pop() in told.stdout


@pytest.mark.slow
def test_the_run_ends_as_well_as_one_without_the_noise(
    make_run: MakeRun, noisy_corpus: Path, tiny_corpus: Path
) -> None:
    """At most 1 % worse than the text without noise, after as many updates at the same rates."""
    noisy = play(make_run("noisy", noisy_corpus, steps=50)).run
    found = bundles_of(noisy)
    assert {place for bundle in found for place in worst_places(bundle)} <= NOISY
    assert len(found) == len(left_out(noisy)) > 3
    told = make_run("clean", tiny_corpus, steps=50)
    skip = tuple(f"{batch}:{batch + 1}" for batch in left_out(noisy))
    clean = play(replace(told, change=Change(skip=skip, reason="a test"))).run
    ends = [read_metrics(run.folder / "metrics.jsonl")[-1] for run in (noisy, clean)]
    assert ends[0]["step"] == ends[1]["step"] == 50 - len(found)
    losses = [float(end["validation/loss"]) for end in ends]
    print(f"validation loss {losses[0]:.4f} with noise left out, {losses[1]:.4f} without noise")
    assert losses[0] < 1.01 * losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    ["event.begin:kill:rank=1:step=13", "event.written:kill:rank=0:step=13"],
    ids=["before it is computed again", "after the bundle was written"],
)
def test_killed_while_an_event_is_recorded_a_run_decides_and_ends_alike(
    kill: str, make_run: MakeRun, noisy_corpus: Path
) -> None:
    whole = play(make_run("whole", noisy_corpus, steps=18)).run
    assert [bundle["step"] for bundle in bundles_of(whole)] == [13]
    killed = play(make_run("killed", noisy_corpus, steps=18), [kill])
    assert killed.codes == (85, 0)
    assert left_out(killed.run) == left_out(whole)
    assert wrong_losses(killed.run.folder, truth_of(whole)) == []
    assert wrong_state(killed.run.folder, truth_of(whole)) == []
    (one,), (other,) = bundles_of(whole), bundles_of(killed.run)
    assert other["sequences"] == one["sequences"]
    assert other["cause"]["kind"] == "data"
    kinds = Counter(incident["kind"] for incident in read_incidents(killed.run.folder))
    assert kinds["loss_spike"] == 1


@pytest.mark.slow
def test_a_run_that_may_not_leave_out_goes_back_and_its_batches_are_to_blame(
    make_run: MakeRun, tiny_corpus: Path
) -> None:
    """Seven batches of garbage in a row, all of each: no sequence stands out from its batch."""
    words = {"steps": 44, "policy": "rewind", "max_skips": 0}
    faults = [GARBAGE.format(batch) for batch in range(20, 27)]
    spoilt = play(make_run("spoilt", tiny_corpus, **words), faults)
    assert spoilt.codes == (85, 0)
    (rewind,) = read_rewinds(spoilt.run.folder)
    assert rewind.onset_step == 20
    assert set(range(20, 26)) <= set(left_out(spoilt.run))
    found = bundles_of(spoilt.run)
    assert [bundle["kind"] for bundle in found] == ["spike", "diverged"]
    assert [bundle["cause"]["kind"] for bundle in found] == ["data", "data"]
    told: Any = [one["detail"] for one in read_incidents(spoilt.run.folder)]
    assert [Path(name).name for name in told[-1]["bundles"]] == [
        path.name for path in find_bundles(spoilt.run.folder)
    ]


@pytest.mark.slow
def test_moments_that_were_spoilt_are_the_optimizers(make_run: MakeRun, tiny_corpus: Path) -> None:
    words = {"steps": 34, "policy": "rewind", "max_skips": 0}
    spoilt = play(make_run("spoilt", tiny_corpus, **words), [GROWN])
    assert spoilt.codes == (85, 0)
    found = bundles_of(spoilt.run)
    assert [bundle["kind"] for bundle in found] == ["spike", "diverged"]
    assert [bundle["cause"]["kind"] for bundle in found] == ["optimizer", "optimizer"], json.dumps(
        [bundle["cause"] for bundle in found]
    )
