"""The page holds every pass and no markup of a name; read as a browser's JSON parser would."""

import json
import re
from html.parser import HTMLParser

import pytest

from pretrain.planner import timeline_page as module
from pretrain.planner.pipeline import PassTimes, Timeline, simulate_pipeline
from pretrain.planner.schedule_order import PipelineShape
from pretrain.planner.timeline_page import timeline_page

MEMORY = [{"weights": 2e9, "activations": 5e9}, {"weights": 3e9, "activations": 4e9}]


def timeline(m: int = 4) -> Timeline:
    shape = PipelineShape(num_stages=2, num_chunks=2, num_micro_batches=m, overlaps_hops=True)
    rows = ((0.1, 0.2), (0.3, 0.1))
    return simulate_pipeline(shape, times=PassTimes(forward_s=rows, backward_s=rows, hop_s=0.01))


def page(title: str = "a plan", m: int = 4) -> str:
    return timeline_page(timeline(m), title=title, said="1 s", memory=MEMORY, capacity_bytes=140e9)


def data(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found
    return json.loads(found[1])


def test_every_pass_is_on_the_page() -> None:
    record, whole = data(page()), timeline()
    stages = record["stages"]
    assert isinstance(stages, list)
    for stage, shown in enumerate(stages):
        for idx, one in enumerate(whole.passes[stage]):
            assert (shown["forward"][idx], shown["chunk"][idx]) == (one.is_forward, one.chunk)
            assert shown["micro_batch"][idx] == one.micro_batch
            assert shown["start"][idx] == pytest.approx(whole.starts_s[stage][idx], abs=1e-6)
        assert len(shown["start"]) == len(whole.passes[stage])
        assert shown["bubble"] == pytest.approx(whole.bubble_shares[stage], abs=1e-6)
    assert record["memory"] == [[2.0, 5.0], [3.0, 4.0]]
    assert record["parts"] == ["weights", "activations"]
    assert record["left_out"] == ""
    assert record["gap"] is None


def test_the_page_asks_nothing_of_a_network() -> None:
    text = page()
    assert "://" not in text
    assert "default-src 'none'" in text


def test_a_name_is_no_markup() -> None:
    title = "</script><img src=x onerror=alert(1)> <!--data--> & $"
    text = page(title)

    class Seen(HTMLParser):
        tags: list[str]

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.append(tag)

    seen = Seen()
    seen.tags = []
    seen.feed(text)
    assert "img" not in seen.tags
    assert seen.tags.count("script") == 2
    assert data(text)["title"] == title


def test_a_long_step_leaves_out_its_middle_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PASSES", 24)
    record, whole = data(page(m=8)), timeline(8)
    stages = record["stages"]
    assert isinstance(stages, list)
    assert record["left_out"] == "20 passes in the middle of each stage are not drawn"
    assert record["gap"] == 6
    for stage, shown in enumerate(stages):
        kept = [*whole.passes[stage][:6], *whole.passes[stage][-6:]]
        assert shown["micro_batch"] == [one.micro_batch for one in kept]


def test_the_reports_step_is_below_three_megabytes() -> None:
    shape = PipelineShape(num_stages=16, num_chunks=3, num_micro_batches=240)
    rows = ((0.012345, 0.023456, 0.034567),) * 16
    long = simulate_pipeline(shape, times=PassTimes(forward_s=rows, backward_s=rows))
    text = timeline_page(long, title="", said="", memory=[], capacity_bytes=140e9)
    assert len(text) < 3_000_000


@pytest.mark.parametrize(
    "memory", [MEMORY[:1], [MEMORY[0], {"weights": 1.0}]], ids=["too few", "other parts"]
)
def test_memory_of_another_pipeline_is_refused(memory: list[dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="memory of"):
        timeline_page(timeline(), title="", said="", memory=memory, capacity_bytes=1.0)
