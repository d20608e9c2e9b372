"""What a process tells torchrun so that it starts the ranks again, or does not."""

import pytest

from pretrain.training.exit_file import STOPS_CHAIN, process_code


def under(restart: int, most: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_MAX_RESTARTS": str(most),
    }


@pytest.mark.parametrize("code", [0, 2, 17, 75, 93])
def test_a_verdict_that_no_restart_mends_ends_with_0_while_restarts_are_left(code: int) -> None:
    assert process_code(code, environment=under(0, 3)) == 0
    assert process_code(code, environment=under(2, 3)) == 0


@pytest.mark.parametrize("code", [1, 16, 85])
def test_what_a_restart_may_mend_keeps_its_code(code: int) -> None:
    assert process_code(code, environment=under(0, 3)) == code


@pytest.mark.parametrize("code", [0, 1, 2, 16, 17, 75, 85, 93])
@pytest.mark.parametrize("environment", [{}, under(3, 3), under(0, 0)])
def test_without_restarts_left_every_code_stays(code: int, environment: dict[str, str]) -> None:
    assert process_code(code, environment=environment) == code


def test_a_chain_ends_with_what_only_a_person_mends_or_nobody_must() -> None:
    assert frozenset({0, 2, 17, 93}) == STOPS_CHAIN
