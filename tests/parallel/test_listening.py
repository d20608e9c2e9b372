"""Can another machine reach the ranks of a local run?"""

import sys
from pathlib import Path

import pytest

from parallel.agent import run_ranks
from parallel.spawn import RankPool
from tests.parallel import listening

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# 127.0.0.1 and ::1, little endian words in hex
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def test_ranks_of_a_command_and_its_parent_listen_on_loopback_alone(
    tmp_path: Path,
) -> None:
    assert run_ranks("tests.parallel.listening:write_addresses", (str(tmp_path),), num_ranks=2) == 0
    for rank in "01":
        lines = (tmp_path / rank).read_text(encoding="ascii").split("\n")
        assert lines, "gloo listens somewhere, or nothing was measured"
        # the parent may be this process, in which other tests have made a world of one rank
        assert "rank" in {line.partition(" ")[0] for line in lines}
        assert {line.partition(" ")[2] for line in lines} <= LOOPBACK


def test_ranks_meet_in_a_folder_that_nobody_else_may_enter(two_ranks: RankPool) -> None:
    assert two_ranks.run(listening.meeting_places) == [[0o700], [0o700]]
