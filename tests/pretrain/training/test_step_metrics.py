"""What is told of a step: against numbers taken by hand, and the same whatever the layout."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.groups import join_world
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.module_names import named_modules_of
from pretrain.model.recompute import Recompute
from pretrain.monitor.metrics import check_names
from pretrain.training.run import Run
from pretrain.training.step_metrics import StepMetrics, load_metrics
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer
from tests.pretrain.training.metric_steps import metrics_of_steps

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def alone(tiny_run: MakeRun, one_rank: object) -> dict[str, float]:
    return metrics_of_steps(tiny_run(bias=True))


def assert_same(found: dict[str, float], expected: dict[str, float], *, rel: float) -> None:
    assert found.keys() == expected.keys()
    wrong: dict[str, tuple[float, float]] = {}
    for name, value in expected.items():
        # other shards have other samples
        most = 0.1 if name.endswith("update_over_weight") else rel
        if name != "loss_max" and not math.isclose(found[name], value, rel_tol=most, abs_tol=1e-6):
            wrong[name] = (found[name], value)
    assert not wrong


def test_every_metric_is_in_the_registry(alone: dict[str, float]) -> None:
    check_names(alone)
    layers = {int(name.split("/")[1]) for name in alone if name.startswith("layer/")}
    assert layers == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, ep=2),
        Layout(num_ranks=2, pp=2),
        pytest.param(Layout(num_ranks=2, cp=2), marks=pytest.mark.slow),
        Layout(num_ranks=2, tp=2, ep=2),
        pytest.param(Layout(num_ranks=2), marks=pytest.mark.slow),
        pytest.param(Layout(num_ranks=2, tp=2, etp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_measure_what_one_measures(
    layout: Layout, alone: dict[str, float], tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    first, second = two_ranks.run(metrics_of_steps, tiny_run(layout, bias=True))
    assert first == second
    assert_same(first, alone, rel=1e-4)


@pytest.mark.parametrize("kind", ["again", "recompute", "micro"])
def test_a_pass_that_is_taken_twice_counts_once(
    kind: str, alone: dict[str, float], tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(bias=True, micro=4 if kind == "micro" else 1)
    if kind == "recompute":
        run = replace(run, recompute=Recompute(kind="full"))
    assert_same(metrics_of_steps(run, again=kind == "again"), alone, rel=1e-4)


def test_recomputation_across_stages_counts_once(
    alone: dict[str, float], tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = replace(tiny_run(Layout(num_ranks=2, pp=2), bias=True), recompute=Recompute(kind="full"))
    assert_same(two_ranks.run(metrics_of_steps, run)[0], alone, rel=1e-4)


class ByHand:
    """Keeps what layers, norms and routers see and give, whole."""

    def __init__(self, trainer: Trainer) -> None:
        (self.chunk,) = trainer.modules
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        for layer, module in enumerate(self.chunk.decoder.layers):
            self._keep(module, None, f"{layer}/residual")
            self._keep(
                module.pre_mlp_layernorm, f"{layer}/pre_mlp_norm_in", f"{layer}/pre_mlp_norm_out"
            )
            if layer:
                post = module.post_mlp_layernorm
                self._keep(post, f"{layer}/post_mlp_norm_in", f"{layer}/post_mlp_norm_out")
                self._keep(module.mlp.router, f"{layer}/router", None)

    def _keep(self, module: Any, given: str | None, made: str | None) -> None:
        def keep(_module: object, inputs: tuple[Tensor, ...], output: Any) -> None:
            if given:
                self.seen[given].append(inputs[0].detach())
            if made:
                self.seen[made].append(
                    (output[0] if isinstance(output, tuple) else output).detach()
                )

        module.register_forward_hook(keep)

    def whole(self, name: str) -> Tensor:
        return torch.stack(self.seen[name]).double()


@pytest.fixture(scope="module")
def by_hand(tiny_run: MakeRun, one_rank: object) -> tuple[ByHand, dict[str, float], Any]:
    """Return what one step's layers saw, its metrics, and its micro-batches."""
    trainer = make_trainer(tiny_run())
    metrics = StepMetrics(trainer, device=join_world())
    hand = ByHand(trainer)
    metrics.begin_step(is_logged=True)
    batches = trainer.next_batch()
    router_weights = [
        layer.mlp.router.weight.detach().clone() for layer in hand.chunk.decoder.layers[1:]
    ]
    result = trainer.step(batches)
    metrics.count(result, trainer.segment, num_microbatches=len(batches))
    found = metrics.read(result)
    trainer.validate(windows_per_domain=1)  # nothing of it may count
    hand.seen["weights"] = router_weights
    return hand, found, batches


def test_activations_are_those_that_the_layers_saw(
    by_hand: tuple[ByHand, dict[str, float], Any],
) -> None:
    hand, found, batches = by_hand
    names = [name for name in hand.seen if "norm" in name or "residual" in name]
    assert len(names) == 4 * 3 + 3 * 2
    for name in names:
        values = torch.stack(hand.seen[name][: len(batches)]).double()
        assert found[f"layer/{name}_rms"] == pytest.approx(float(values.square().mean().sqrt()))
        assert found[f"layer/{name}_abs_max"] == pytest.approx(float(values.abs().max()))


def test_entropy_and_loads_are_those_of_scores_and_choices(
    by_hand: tuple[ByHand, dict[str, float], Any],
) -> None:
    hand, found, batches = by_hand
    for layer, weight_ED in enumerate(hand.seen["weights"], start=1):
        x_TD = torch.cat([x.flatten(0, -2) for x in hand.seen[f"{layer}/router"][: len(batches)]])
        scores_TE = (x_TD @ weight_ED.T).sigmoid()
        chosen = torch.distributions.Categorical(probs=scores_TE)
        expected = float(chosen.entropy().mean()) / math.log(8)
        assert found[f"layer/{layer}/router_entropy"] == pytest.approx(expected, rel=1e-5)
        # the best two of four groups of two, by the sum of their experts: all their experts
        groups_TG = scores_TE.unflatten(1, (4, 2)).sum(2)
        best_TG = torch.zeros_like(groups_TG).scatter(1, groups_TG.topk(2).indices, 1.0)
        counts_E = best_TG.repeat_interleave(2, dim=1).sum(0)
        mean = float(counts_E.mean())
        assert found[f"layer/{layer}/load_max_over_mean"] == pytest.approx(
            float(counts_E.max()) / mean
        )
        assert found[f"layer/{layer}/load_min_over_mean"] == pytest.approx(
            float(counts_E.min()) / mean
        )


def test_an_expert_without_tokens_is_dead() -> None:
    counts = torch.tensor([[0, 0, 0, 0], [4, 4, 4, 4], [16, 0, 0, 0]])
    found = load_metrics(counts, 1)
    assert found["layer/1/load_max_over_mean"] == 1.0
    assert found["load_max_over_mean"] == 4.0
    assert (found["load_min_over_mean"], found["dead_experts"]) == (0.0, 3)
    assert "layer/0/dead_experts" not in found


def test_norms_of_modules_add_up_to_the_norm_of_the_step(alone: dict[str, float]) -> None:
    norms = [v for name, v in alone.items() if name.startswith("module/") and "gradient" in name]
    assert len(norms) == 1 + 3 + 3 * 5 + 2 + 6
    assert math.hypot(*norms) == pytest.approx(alone["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_is_what_moves_the_masters(
    bf16: bool, tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run(bf16=bf16))
    metrics = StepMetrics(trainer, device=join_world())

    def masters() -> dict[str, Tensor]:
        kept: dict[str, list[Tensor]] = defaultdict(list)
        (part,) = trainer.optimizer.chained_optimizers
        for name, parameter in named_modules_of(trainer.modules[0], num_layers=5):
            group, idx = part.model_param_group_index_map[parameter]
            kept[name].append(part.optimizer.param_groups[group]["params"][idx].detach().clone())
        return {name: torch.cat([x.flatten() for x in xs]) for name, xs in kept.items()}

    for step in range(3):
        before = masters()
        metrics.begin_step(is_logged=step == 2)
        result = trainer.step(trainer.next_batch())
        metrics.count(result, trainer.segment, num_microbatches=8)
    found, after = metrics.read(result), masters()
    for name, old in before.items():
        expected = float((after[name] - old).norm() / old.norm())
        assert found[f"module/{name}/update_over_weight"] == pytest.approx(expected, rel=0.03), name
    both = [torch.cat(list(each.values())) for each in (before, after)]
    expected = float((both[1] - both[0]).norm() / both[0].norm())
    assert found["update_over_weight"] == pytest.approx(expected, rel=0.03)


def test_the_bias_moves_by_its_rate(alone: dict[str, float]) -> None:
    """The sign of each expert's surplus decides, so a step moves each by the rate or not at all."""
    for layer in (1, 2, 3, 4):
        assert 0.5e-3 < alone[f"layer/{layer}/router_bias_speed"] <= 1.0001e-3
        assert alone[f"layer/{layer}/router_bias_range"] in (
            pytest.approx(0.0), pytest.approx(2e-3), pytest.approx(4e-3),
        )  # fmt: skip


def test_losses_of_domains_and_sequences_are_those_of_the_batch(
    tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run(micro=1, spec={"num_mtp_layers": 0}))
    metrics = StepMetrics(trainer, device=join_world())
    metrics.begin_step(is_logged=True)
    batches = trainer.next_batch()
    (chunk,) = trainer.modules
    losses: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        for batch in batches:
            logits = chunk.eval()(batch.tokens, torch.arange(64)[None], None)[0]
            loss = float(torch.nn.functional.cross_entropy(logits, batch.labels[0]))
            losses[trainer.corpus.domains[int(batch.domain_idx)]].append(loss)
    chunk.train()
    result = trainer.step(batches)
    metrics.count(result, trainer.segment, num_microbatches=len(batches))
    found = metrics.read(result)
    assert len(losses) == 2
    for name, values in losses.items():
        assert found[f"train/{name}/loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    worst = max(max(values) for values in losses.values())
    assert found["sequence_loss_max"] == pytest.approx(worst, rel=1e-5)
    assert result.loss_max == pytest.approx(result.loss)  # of one replica


def losses_of_a_step(run: Run) -> tuple[float, float, list[list[float]]]:
    """Return loss and largest loss of a step, and this rank's sums of sequences; on every rank."""
    trainer = make_trainer(run)
    result = trainer.step(trainer.next_batch())
    sums = [] if result.sequence_sums is None else result.sequence_sums.tolist()
    return result.loss, result.loss_max, sums


@pytest.mark.parametrize("axis", ["dp", "pp", "cp"])
def test_the_largest_loss_is_of_a_replica(
    axis: str, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    layouts = {
        "dp": Layout(num_ranks=2),
        "pp": Layout(num_ranks=2, pp=2),
        "cp": Layout(num_ranks=2, cp=2),
    }
    (loss, largest, sums), (_, also, others) = two_ranks.run(
        losses_of_a_step, tiny_run(layouts[axis])
    )
    assert largest == also
    assert len(sums) == {"dp": 4, "pp": 0, "cp": 8}[axis]
    means = [sum(s for s, _ in part) / sum(n for _, n in part) for part in (sums, others) if part]
    if axis == "dp":
        assert largest == pytest.approx(max(means)) != pytest.approx(min(means))
    else:
        assert largest == pytest.approx(loss)
