"""Does every file of conf/ compose into a configuration that stands?"""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from launch.dry_run import OWN as OF_DRY_RUN
from launch.inspection import Inspection
from launch.plan import OWN as OF_PLAN
from pretrain.model.spec import ModelSpec
from pretrain.training.batch import check_divisible
from pretrain.training.run import Run

CONF = Path(__file__).resolve().parents[1] / "conf"
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))
OF_INSPECTION = ("curriculum", "described")
ONLY_INSPECTED = ("described",)
GROUPS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("cluster", "experiment", *ONLY_INSPECTED)
)
CLUSTERS = sorted(path.stem for path in CONF.glob("cluster/*.yaml"))
# A choice that needs others beside it to stand: without them the run is refused, and rightly so.
WITH = {
    "layout=pp16_ep8": ["model=axk1_519b", "curriculum=axk1"],
    "lr_schedule=wsd": ["model=axk1_519b", "curriculum=axk1"],
    "curriculum=axk1": ["model=axk1_519b"],
    "model=verify_tiny": ["curriculum=plain"],
}


def composed(*overrides: str) -> Run:
    with initialize_config_dir(str(CONF), version_base=None):
        return build(Run, compose("pretrain", list(overrides)))


@pytest.mark.parametrize("choice", GROUPS)
def test_every_choice_of_every_group_stands(choice: str) -> None:
    run = composed(choice, *WITH.get(choice, []))
    assert isinstance(run.model, ModelSpec)


@pytest.mark.parametrize(
    "path", [path for group in OF_INSPECTION for path in CONF.glob(f"{group}/*.yaml")]
)
def test_every_curriculum_and_corpus_can_be_inspected(path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        assert build(Inspection, compose("inspect_data", [f"{path.parent.name}={path.stem}"]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        assert compose(command)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_is_the_full_model_in_fp8_on_its_ranks(cluster: str) -> None:
    run = composed(f"+cluster={cluster}")
    assert run.layout.num_ranks == int(cluster.rpartition("_")[2])
    assert run.model.num_layers == 61
    assert run.precision.kind == "fp8"


@pytest.mark.parametrize("overrides", [[], *([f"+cluster={name}"] for name in CLUSTERS)], ids=str)
@pytest.mark.parametrize(("command", "own"), [("dry_run", OF_DRY_RUN), ("plan", OF_PLAN)])
def test_a_dry_run_or_plan_is_of_the_run_that_the_same_words_would_train(
    command: str, own: tuple[str, ...], overrides: list[str]
) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(command, overrides)
    run = build(Run, {str(key): cfg[key] for key in cfg if key not in own})
    assert run == composed(*overrides)


def test_the_command_line_wins_over_a_cluster() -> None:
    assert composed("+cluster=h200_1536", "layout.pp=8").layout.pp == 8


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_composes_and_its_run_is_named_after_it(path: Path) -> None:
    assert composed(f"+experiment={path.stem}").name.startswith(path.stem)


def test_1024_and_1536_gpus_share_every_batch_of_the_ramp() -> None:
    for cluster in CLUSTERS:
        run = composed(f"+cluster={cluster}")
        segments, tokens = run.timetable.segments, run.micro_batch_tokens
        check_divisible(segments, micro_batch_tokens=tokens, dp=run.layout.dp)
