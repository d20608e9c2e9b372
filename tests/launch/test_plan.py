"""Does launch/plan.py plan the report's run as it says, and refuse what it cannot plan?"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.compose import run
from launch.plan import main
from pretrain.planner.hardware import hardware_of
from pretrain.training import forecasts
from pretrain.training.start import USER_ERRORS

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return what runs the command in this process, and gives its exit code and what it said."""

    def command(*words: str) -> tuple[int, str, str]:
        cluster = [] if any("cluster=" in word for word in words) else ["+cluster=h200_1536"]
        monkeypatch.setattr(sys, "argv", ["plan.py", *cluster, *words])
        code = run(main, user_errors=USER_ERRORS)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_the_reports_run_trains_as_much_of_its_time_as_we_want(
    plan: Command, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "goodput.json"
    code, out, _ = plan("action=goodput", f"output={path}")
    assert code == 0
    for words in (
        "527,688,113,152 parameters * 14 bytes = 7.39 TB, 13.93 GB of the heaviest of 1,536 ranks",
        "62,914,560 tokens in 40.9 s",
        "27,648 GPU-hours of 75 days",
        "write to storage       184.69  counted  goodput.persist_bytes_per_s",
        "processes and groups   300.00  assumed  goodput.init_s",
        "arXiv 2407.21783",
    ):
        assert words in out, out
    table = out[out.index("failures as") :].splitlines()
    rows = {line[:18].strip(): line[18:].split() for line in table[1:5]}
    hours = [cells[0] for cells in rows.values()]
    assert hours == ["33.0", "19.2", "5.3", "4.8"]
    assert [cells[2] for cells in rows.values()] == ["55", "94", "342", "372"]

    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["command"].startswith("python ")
    assert record["commit"]
    assert record["state_bytes"] == 14 * 527_688_113_152
    by_name = {row["name"]: row for row in record["rows"]}
    # the goal at the rate of Llama 3, and what is lost by waiting for the storage
    assert by_name["Llama 3"]["simulated"]["ettr"] >= 0.97
    assert by_name["Llama 3"]["waiting"] < 0.97
    for row in record["rows"]:
        # what the closed form leaves out costs: a save that is not persisted yet is lost
        lost = record["persist_s"] / row["mtbf_s"]
        assert row["closed_form"] - row["simulated"]["ettr"] == pytest.approx(lost, abs=0.0025)
        assert row["simulated"]["standard_error"] < 0.0005
        assert row["best_closed_form"] > row["closed_form"]


def test_a_cheap_local_tier_helps_where_nodes_stay(plan: Command, tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"

    def ettr(*words: str) -> float:
        assert (
            plan("action=goodput", "goodput.node_loss_share=0.2", "goodput.blocking_s=1", *words)[0]
            == 0
        )
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return next(r["simulated"]["ettr"] for r in rows if r["name"] == "RSC, by jobs")

    tier = ("checkpoints.local.folder=/nvme/run", "checkpoints.local.interval_steps=5")
    assert ettr(*tier, f"output={path}") > ettr(f"output={path}") + 0.02


def test_measured_times_take_the_place_of_assumed_ones(plan: Command, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"measured": {"blocking_s": 0.25, "detection_s": 4}}))
    code, out, _ = plan("action=goodput", f"goodput.measured={path}")
    assert code == 0
    assert "agreement                0.25  measured  goodput.blocking_s" in out
    assert "detection                4.00  measured  goodput.detection_s" in out
    assert "processes and groups   300.00  assumed   goodput.init_s" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["action=memory"], ["action", "'memory'", "'goodput'", "'search'"]),
        (
            ["action=goodput", "checkpoints.interval_steps=0"],
            ["checkpoints.interval_steps=0", "give 1 or more"],
        ),
        (
            ["action=run", "checkpoints.interval_steps=0"],
            ["checkpoints.interval_steps=0", "give 1 or more"],
        ),
        (["goodput.tokens_per_s=0"], ["goodput.tokens_per_s=0", "above 0"]),
        (
            ["checkpoints.local.folder=/nvme/a", "checkpoints.local.interval_steps=7"],
            ["checkpoints.local.interval_steps=7", "divide"],
        ),
        (
            ["action=goodput", "goodput.measured=nowhere.json"],
            ["goodput.measured=nowhere.json", "measured"],
        ),
        (["goodput.persist=1"], ["goodput.persist", "persist_bytes_per_s"]),
        (["layout.pp=7"], ["layout.pp=7", "1536 ranks"]),
        (["layout.pp=-2"], ["layout.pp=-2", "at least 1"]),
        (["cluster.num_nodes=0"], ["cluster.num_nodes=0", "at least 1"]),
        (["cluster.num_nodes=100"], ["layout.num_ranks=1536", "cluster.num_nodes=100", "= 800"]),
        (["layout.vp=4"], ["64 stages", "lower layout.pp or layout.vp"]),
        (["layout.ep=7"], ["layout.ep=7", "1536 ranks"]),
        (["assumed.gpu=H900"], ["gpu=H900", "H200", "H100"]),
        (["assumed.step_error=1"], ["assumed.step_error=1", "0 to 1, or null"]),
        (["prediction.expert_imbalance=0.5"], ["prediction.expert_imbalance=0.5", "1 (balanced)"]),
        (["prediction.reserved_bytes=-1"], ["prediction.reserved_bytes=-1", "0 or more"]),
        (["action=run", "campaign.failures=never"], ["campaign.failures=never", "Llama 3"]),
        (["action=run", "campaign.token_shares=[1.0]"], ["campaign.token_shares", "[1024, 1536]"]),
        (["campaign.token_shares=[0.5,0.6]"], ["campaign.token_shares", "sum is 1"]),
        (["campaign.pue=0.5"], ["campaign.pue=0.5", "1 or more"]),
        (["campaign.context=[{window_tokens: 16384, cp: 0}]"], ["cp=0", "at least 1"]),
        (["campaign.context=[{window_tokens: 16384, cp: 5}]"], ["layout.cp=5", "1536 ranks"]),
        (["action=search", "search.pp=[]"], ["search.pp=[]", "at least one"]),
        (["action=search", "search.ep=[0]"], ["search.ep=[0]", "at least 1"]),
        (["action=search", "search.recompute=[half]"], ["half", "run, none, full"]),
        (["action=search", "search.window_tokens=[100]"], ["search.window_tokens=100", "4096"]),
        (["action=search", "figures=here"], ["figures=here", "action=plan"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_wrong_configuration_ends_with_2_and_names_the_key(
    plan: Command, words: list[str], named: list[str]
) -> None:
    code, _, err = plan(*words)
    assert code == 2
    assert all(word in err for word in named), err


@pytest.mark.parametrize(
    "text", ["", "[]", '{"measured": {"init_s": "soon"}}', '{"measured": {"init_s": -1}}']
)
def test_measurements_that_are_none_are_refused(plan: Command, text: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(text)
    code, _, err = plan("action=goodput", f"goodput.measured={path}")
    assert code == 2
    assert f"goodput.measured={path}" in err


def test_a_step_is_planned_for_every_length_of_the_curriculum(
    plan: Command, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = plan(f"output={path}")
    assert code == 0
    for words in (
        "15,360 sequences of 4,096 tokens on H200s: tp1 cp1 pp16 vp1 ep8 etp1 dp96 (1536 ranks)",
        "3,840 sequences of 16,384 tokens on H200s: tp1 cp4",
        "1,920 sequences of 32,768 tokens on H200s: tp1 cp8",
        "next: python launch/plan.py <the same words> action=search",
    ):
        assert words in out, out
    record = json.loads(path.read_text(encoding="utf-8"))
    known = hardware_of("H200").step_error
    assert known is not None
    assert record["step_error"] == {"low": known.low, "high": known.high, "source": str(known)}
    assert f"intervals  {known}" in out
    steps = record["steps"]
    for step in steps:
        parts = step["parts_s"]
        assert sum(parts.values()) == pytest.approx(step["step_s"]["value"])
        assert step["step_s"]["low"] < step["step_s"]["value"] < step["step_s"]["high"]
        tokens = step["window_tokens"] * step["global_sequences"]
        pace = tokens / step["step_s"]["value"] / 1536
        assert step["tokens_per_s_per_gpu"] == pytest.approx(pace)
        assert step["step_s"]["high"] == pytest.approx((1 + known.high) * step["step_s"]["value"])
        assert step["step_s"]["low"] == pytest.approx((1 + known.low) * step["step_s"]["value"])
        pipeline = step["pipeline"]
        replicas = 1536 // (16 * step["layout"]["cp"])
        micro_batches = step["global_sequences"] // replicas
        assert [stage["num_passes"] for stage in pipeline["stages"]] == [2 * micro_batches] * 16
        assert pipeline["stages"][0]["first_s"] == 0
        assert max(stage["last_s"] for stage in pipeline["stages"]) == pipeline["seconds"]
        assert pipeline["seconds"] < step["step_s"]["value"]
    # 62.9M tokens each, so longer windows differ by their attention
    assert len(steps) == 3
    assert steps[0]["step_s"]["value"] < steps[1]["step_s"]["value"] < steps[2]["step_s"]["value"]


SMALL_SEARCH = [
    "action=search",
    "search.tp=[1]",
    "search.cp=[1,4,8]",
    "search.pp=[8,16]",
    "search.vp=[1]",
    "search.ep=[8]",
]


def test_a_search_sets_the_reports_layouts_beside_the_fastest_at_every_length(
    plan: Command, tmp_path: Path
) -> None:
    path = tmp_path / "search.json"
    code, out, _ = plan(*SMALL_SEARCH, f"output={path}")
    assert code == 0
    searches = json.loads(path.read_text(encoding="utf-8"))["searches"]
    assert [one["window_tokens"] for one in searches] == [4096, 16384, 32768]
    table = out[out.index("side by side") :]
    for one, cp in zip(searches, (1, 4, 8), strict=True):  # 4 and 8: the report, at long context
        named = one["side_by_side"]
        assert list(named) == ["fastest found", "report, first", "report, final", "this run"]
        best, first, final = (
            named[name] for name in ("fastest found", "report, first", "report, final")
        )
        assert best["step_s"] == min(found["step_s"] for found in one["found"])
        assert {key: first["layout"][key] for key in ("pp", "ep", "cp")} == {
            "pp": 8, "ep": 32, "cp": cp
        }  # fmt: skip
        assert final["layout"] == named["this run"]["layout"]
        assert (final["layout"]["pp"], final["layout"]["ep"]) == (16, 8)
        for layout in (first, final):
            assert layout["over_fastest"] == pytest.approx(layout["step_s"] / best["step_s"] - 1)
        # its experts are on four nodes, so three tokens in four leave theirs
        assert first["rising_part"] == "expert_exchange"
        assert f"{first['step_s']:.2f} s" in table
        judged = sum(len(refusal["choices"]) for refusal in one["refusals"]) + len(one["found"])
        assert judged == one["num_choices"] == 6
        assert all(reason for refusal in one["refusals"] for _, reason in refusal["choices"])


def test_the_command_that_a_search_suggests_runs(plan: Command) -> None:
    """Interleaved, 20 micro-batches of the longest windows are not whole rounds of 8 stages."""
    grid = ["search.tp=[1,2]", "search.pp=[8]", "search.vp=[1,4]", "search.window_tokens=[4096]"]
    code, out, _ = plan(*SMALL_SEARCH, *grid)
    assert code == 0
    fastest = next(line for line in out.splitlines() if "fastest 1" in line).split()
    assert fastest[5] == "4"  # chunks, which the fastest has, and the curriculum does not allow
    suggested = out.splitlines()[-1]
    assert "that the run may have at every length" in suggested
    words = suggested.partition("action=plan ")[2].split()
    assert "layout.vp=1" in words
    assert plan("action=plan", *words)[0] == 0
    assert plan("action=plan", *words, "layout.vp=4")[0] == 2


def test_a_named_layout_that_is_out_says_why(plan: Command, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    few = ["model.num_routed_experts=24", "cluster.gpu_memory_bytes=30_000_000_000"]
    code, out, _ = plan(
        *SMALL_SEARCH, *few, "search.window_tokens=[4096]", "search.pp=[16]", f"output={path}"
    )
    assert code == 0
    named = json.loads(path.read_text(encoding="utf-8"))["searches"][0]["side_by_side"]
    assert "model.num_routed_experts=24" in named["report, first"]["why_out"]
    assert named["report, final"]["why_out"].startswith("does not fit: ")
    assert named["report, final"]["peak_bytes"] > 23e9
    assert "4,096, report, first: out: " in out
    assert "nothing can be trained" in out


def test_an_error_that_is_given_takes_the_place_of_the_measured_one(
    plan: Command, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = plan("assumed.step_error=0.1", f"output={path}")
    assert code == 0
    assert "intervals  10% either way: assumed.step_error" in out
    for step in json.loads(path.read_text(encoding="utf-8"))["steps"]:
        seconds = step["step_s"]
        assert (seconds["low"], seconds["high"]) == (
            pytest.approx(0.9 * seconds["value"]),
            pytest.approx(1.1 * seconds["value"]),
        )


def test_a_gpu_without_measured_errors_asks_for_one(
    plan: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = replace(hardware_of("H200"), step_error=None)
    monkeypatch.setattr(forecasts, "hardware_of", lambda _: prior)
    code, _, err = plan()
    assert code == 2
    assert "assumed.step_error=null given for assumed.gpu=H200" in err
    assert plan("assumed.step_error=0.3")[0] == 0


def test_the_figures_are_drawn_where_asked(plan: Command, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "figures"
    code, out, _ = plan(f"figures={folder}")
    assert code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(
        f"timeline_{window}.{kind}" for window in (4096, 16384, 32768) for kind in ("html", "png")
    )
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in out
    page = (folder / "timeline_4096.html").read_text(encoding="utf-8")
    assert page.count('"forward":[') == 16


def test_the_whole_run_stands_beside_the_reports(plan: Command, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    code, out, _ = plan("action=run", f"output={path}")
    assert code == 0
    for words in ("10T, stages 9.26T", "301.72 at the end", "2.7M at 1,536 GPUs for 75 days"):
        assert words in out
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["tokens"] == pytest.approx(9.26e12, rel=1e-3)
    legs = record["legs"]
    tokens = [leg["stretch"] for leg in legs]
    assert {leg["num_ranks"] for leg in tokens} == {1024, 1536}
    small = sum(
        leg["window_tokens"] * leg["global_sequences"] * leg["num_steps"]
        for leg in tokens
        if leg["num_ranks"] == 1024
    )
    assert small == pytest.approx(0.36 * 9.26e12, rel=1e-3)
    days = sum(
        leg["step_s"]["value"] * leg["stretch"]["num_steps"] / leg["ettr"] / 86_400 for leg in legs
    )
    assert record["days"]["value"] == pytest.approx(days)
    known = hardware_of("H200").step_error
    assert known is not None
    assert record["days"]["low"] == pytest.approx((1 + known.low) * days)
    assert record["days"]["high"] == pytest.approx((1 + known.high) * days)
    assert f"  intervals: {known}" in out
    assert record["megawatt_hours"]["value"] == pytest.approx(
        record["gpu_hours"]["value"] * 1050 * 1.56 / 1e6
    )
    assert all(0.9 < leg["ettr"] < 1 for leg in legs)


def test_planning_needs_no_torch() -> None:
    code = "import sys, launch.plan; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
