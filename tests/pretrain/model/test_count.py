"""Parameters and arithmetic: against the report, megatron, transformers and torch's counter."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AXK1Config, AXK1ForCausalLM

from kernels import native
from kernels.attention import causal_attention_reference
from parallel.layout import Layout
from parallel.schedule import MicroBatch, forward_backward
from parallel.spawn import RankPool
from pretrain.model.count import ParameterCount, count_parameters, flop_per_token
from pretrain.model.dry_run import build_on_meta
from pretrain.model.spec import ModelSpec
from pretrain.training.run import Run
from pretrain.training.verify import make_trainer

MakeRun = Callable[..., Run]

AXK1 = ModelSpec(
    num_layers=61,
    num_dense_layers=1,
    hidden_size=7168,
    dense_ffn_size=18432,
    num_routed_experts=192,
    num_experts_per_token=8,
    num_shared_experts=1,
    expert_ffn_size=2048,
    num_expert_groups=8,
    num_groups_per_token=4,
    routed_scaling=2.5,
    num_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_size=128,
    qk_rope_head_size=64,
    v_head_size=128,
    vocab_size=163840,
    max_context_tokens=131072,
    num_mtp_layers=1,
)


def test_a_x_k1_has_the_parameters_of_the_report() -> None:
    # AXK1Config() of transformers 5.23.0 on the meta device, part by part.
    assert count_parameters(AXK1) == ParameterCount(
        attention=101_124_096,
        dense_layer=497_500_160,
        moe_layer=8_602_278_912,
        moe_layer_active=498_883_584,
        embedding=1_174_405_120,
        main=518_983_052_288,
        mtp=8_705_060_864,
        active=32_779_332_608,
    )
    assert count_parameters(AXK1).total == 527_688_113_152


def test_megatron_builds_as_many_on_the_meta_device(one_rank: object) -> None:
    counts = build_on_meta(AXK1, layout=Layout())
    mtp = sum(count for name, count in counts.items() if name.startswith("mtp."))
    assert sum(counts.values()) == 527_688_113_152
    assert sum(counts.values()) - mtp == 518_983_052_288


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_mtp_layers": 0}, {"dual_norm": False}, {"num_dense_layers": 0, "num_layers": 2}],
    ids=str,
)
def test_the_closed_form_holds_for_variants(
    changes: dict[str, int], tiny_run: MakeRun, one_rank: object
) -> None:
    spec = replace(tiny_run().model, **changes)
    counts, expected = build_on_meta(spec, layout=Layout()), count_parameters(spec)
    assert sum(counts.values()) == expected.total
    assert sum(n for name, n in counts.items() if name.startswith("mtp.")) == expected.mtp


@pytest.mark.parametrize(
    "sizes", [{"pp": 2}, {"pp": 2, "vp": 2}], ids=["two stages", "two stages of two chunks"]
)
def test_stages_together_hold_each_weight_once(
    sizes: dict[str, int], tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    spec = tiny_run().model
    first, last = two_ranks.run(build_on_meta, spec, layout=Layout(num_ranks=2, **sizes))
    # MTP reads the embedding, so the last stage holds a copy of it under the same name.
    assert set(first) & set(last) == {"embedding.word_embeddings.weight"}
    assert sum({**first, **last}.values()) == count_parameters(spec).total


@pytest.mark.parametrize("num_dense", [1, 2])
def test_transformers_counts_the_same_main_model(num_dense: int, tiny_run: MakeRun) -> None:
    spec = replace(tiny_run().model, num_dense_layers=num_dense)
    config = AXK1Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.dense_ffn_size,
        moe_intermediate_size=spec.expert_ffn_size,
        num_hidden_layers=spec.num_layers,
        mlp_layer_types=["dense"] * num_dense + ["sparse"] * spec.num_moe_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_heads,
        n_routed_experts=spec.num_routed_experts,
        n_shared_experts=spec.num_shared_experts,
        num_experts_per_tok=spec.num_experts_per_token,
        n_group=spec.num_expert_groups,
        topk_group=spec.num_groups_per_token,
        q_lora_rank=spec.q_lora_rank,
        kv_lora_rank=spec.kv_lora_rank,
        qk_nope_head_dim=spec.qk_nope_head_size,
        qk_rope_head_dim=spec.qk_rope_head_size,
        v_head_dim=spec.v_head_size,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = AXK1ForCausalLM(config)
    assert sum(weight.numel() for weight in model.parameters()) == count_parameters(spec).main


def test_training_a_token_takes_the_arithmetic_of_the_report() -> None:
    alone = flop_per_token(replace(AXK1, num_mtp_layers=0), sequence_tokens=4096)
    with_mtp = flop_per_token(AXK1, sequence_tokens=4096)
    assert alone == pytest.approx(204.5e9, abs=0.05e9)
    assert with_mtp == pytest.approx(215.4e9, abs=0.05e9)
    # 6 per active parameter but the input embedding, the usual estimate, lacks only the scores.
    estimate = 6 * (count_parameters(AXK1).active - count_parameters(AXK1).embedding)
    assert 1.0 < alone / estimate < 1.1


def attention_flop(spec: ModelSpec, *, sequence_tokens: int) -> float:
    """Return the scores' and values' share of `flop_per_token`: what torch counts, but causal."""
    S, N, H, W = sequence_tokens, spec.num_heads, spec.qk_head_size, spec.v_head_size
    q, k, v = (torch.ones(1, N, S, size, requires_grad=True) for size in (H, H, W))
    with FlopCounterMode(display=False) as counter:
        causal_attention_reference(q, k, v, scale=1.0).sum().backward()
    seen = (S + 1) / (2 * S)  # the written-out scores fill the whole square
    num_layers = spec.num_layers + spec.num_mtp_layers
    return counter.get_total_flops() * seen * num_layers / S


def read_nothing(_batch: MicroBatch, token_loss_BS: Tensor) -> Tensor:
    return token_loss_BS.sum()


def test_torch_counts_the_same_arithmetic(
    tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "blas_product", lambda: 0)  # torch counts what torch is asked for
    run = tiny_run(micro=1)
    trainer = make_trainer(run)
    batches = trainer.next_batch()[:2]
    with FlopCounterMode(display=False) as counter:
        forward_backward(
            trainer.chunks,
            [iter(batches)],
            num_microbatches=2,
            micro_batch_size=1,
            sequence_length=64,
            read_loss=read_nothing,
        )
    counted = counter.get_flop_counts()["Global"]
    # attention's products come in batches, and some gradients add themselves to a sum
    matrices = (counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]) / (2 * 64)
    # Left out by our convention: the router, 6 for each of its weights.
    routers = 6 * 8 * 64 * (run.model.num_moe_layers + run.model.num_mtp_layers)
    # MTP's last token has no label, counts unlike the others, and its share of the gradient of the
    # head's weight is taken back: logits and gradient of one token in 64.
    again = 2 * 2 * 64 * run.model.vocab_size / 64
    flop = partial(flop_per_token, run.model)
    assert matrices - routers - again == flop(sequence_tokens=64) - attention_flop(
        run.model, sequence_tokens=64
    )
