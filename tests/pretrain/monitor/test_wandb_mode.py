from pathlib import Path

import pytest

from pretrain.monitor.wandb_mode import choose_mode, keep_run_id


def choose(tmp_path: Path, mode: str = "auto", **environment: str) -> str:
    chosen, reason = choose_mode(
        mode,  # type: ignore[arg-type]
        environment=environment,
        home=tmp_path,
        folder=tmp_path / "work",
    )
    assert reason
    return chosen


def test_a_user_who_is_not_logged_in_runs_offline(tmp_path: Path):
    assert choose(tmp_path) == "offline"


def test_an_api_key_means_online(tmp_path: Path):
    assert choose(tmp_path, WANDB_API_KEY="k" * 40) == "online"


@pytest.mark.parametrize(("host", "mode"), [("api.wandb.ai", "online"), ("github.com", "offline")])
def test_a_netrc_counts_for_the_server_it_names(tmp_path: Path, host: str, mode: str):
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {'k' * 40}\n")
    assert choose(tmp_path) == mode


def test_a_login_at_a_private_server_is_found(tmp_path: Path):
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    (tmp_path / "my_netrc").write_text("machine wandb.example.org login user password k\n")
    assert choose(tmp_path, NETRC=str(tmp_path / "my_netrc")) == "online"


def test_a_broken_netrc_is_no_login(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / ".netrc").write_text("what is this\n")
    assert choose(tmp_path) == "offline"
    assert "not understood" in caplog.text


@pytest.mark.parametrize(
    ("word", "mode"),
    [("offline", "offline"), ("disabled", "disabled"), ("dryrun", "offline"), ("online", "online")],
)
def test_the_environment_is_asked_before_the_login(tmp_path: Path, word: str, mode: str):
    assert choose(tmp_path, WANDB_MODE=word, WANDB_API_KEY="k" * 40) == mode


def test_the_configuration_is_asked_before_the_environment(tmp_path: Path):
    assert choose(tmp_path, "disabled", WANDB_MODE="online") == "disabled"


def test_wandb_offline_on_the_command_line_is_remembered(tmp_path: Path):
    settings = tmp_path / "work" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = offline\n")
    assert choose(tmp_path, WANDB_API_KEY="k" * 40) == "offline"


def test_a_word_that_is_no_mode_is_told_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert choose(tmp_path, WANDB_MODE="sometimes") == "offline"
    assert "WANDB_MODE=sometimes" in caplog.text


def test_a_run_folder_keeps_its_id(tmp_path: Path):
    first = keep_run_id(tmp_path / "run", environment={})
    assert keep_run_id(tmp_path / "run", environment={}) == first
    assert keep_run_id(tmp_path / "other", environment={}) != first


def test_an_id_of_the_user_is_taken(tmp_path: Path):
    assert keep_run_id(tmp_path, environment={"WANDB_RUN_ID": "mine"}) == "mine"
