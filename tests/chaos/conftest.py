"""One run that nothing disturbs, for all comparisons."""

from pathlib import Path

import pytest

from tests.chaos.oracles import Truth, truth_of
from tests.chaos.play import Played, play
from tests.chaos.scenario import Scenario


@pytest.fixture(scope="session")
def whole(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Return a run that nothing disturbs."""
    scenario = Scenario(layout="ep2")
    run = scenario.run(tmp_path_factory.mktemp("whole"), corpus=tiny_corpus, name="whole")
    return play(run)


@pytest.fixture(scope="session")
def truth(whole: Played) -> Truth:
    """Return what it has left."""
    return truth_of(whole.run)
