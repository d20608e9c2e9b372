"""How long do matrix products and attention take?

A product of `[M, K]` by `[K, N]` runs at `peak * share * f(M) f(N) f(K)`, f(d) = d / (d + half).
The curve is the same in all three dimensions, so both products of the backward pass take as long as
the forward one. Worked: M = 8,192, N = K = 4,096 with half = 128 runs at 0.926 of its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.planner.hardware import Hardware
from pretrain.planner.workload import Workload

ATTENTION_HALF_HEAD = 32
"""Head size at which attention is half as fast; flash attention's own tables, 64 against 128."""
ATTENTION_BACKWARD = 2.5
"""Products of the backward pass over those of the forward one: five against two."""
TORCH_ATTENTION = 0.57
"""Speed of FlashAttention 2 over that of FlashAttention 3, which is 1.5 to 2.0 times as fast
(arXiv 2407.08608): the middle."""
WINDOW_BLOCK_TOKENS = 128
"""Keys a windowed query reads beyond its window: whole blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """`count` products of `[rows, inner]` by `[inner, columns]` that run together."""

    rows: float
    """M, tokens."""
    columns: float
    """N."""
    inner: float
    """K."""
    count: float = 1
    """Experts of a rank; 1: no grouped product."""
    is_low: bool = True
    """Whether it runs in the workload's low-precision format; the head does not."""

    @property
    def flop(self) -> float:
        """Multiply-adds, two each."""
        return 2 * self.count * self.rows * self.columns * self.inner

    @property
    def input_values(self) -> float:
        """Values of the left operand, `[rows, inner]`."""
        return self.count * self.rows * self.inner

    @property
    def output_values(self) -> float:
        """Values of the result, `[rows, columns]`."""
        return self.count * self.rows * self.columns


def product_s(product: Product, *, workload: Workload, hardware: Hardware) -> float:
    """Return the seconds of the forward product; the backward pass takes twice as long."""
    gpu, constants = hardware.gpu, hardware.constants
    reached = gpu.bf16_flop_per_s * constants.product_bf16
    if product.is_low and workload.number_format == "fp8":
        reached = gpu.fp8_flop_per_s * constants.product_low
    elif product.is_low and workload.number_format == "nvfp4":
        reached = gpu.fp4_flop_per_s * constants.product_low
    half = constants.half_size
    for size in (product.rows, product.columns, product.inner):
        reached *= size / (size + half)
    if product.count > 1:
        reached *= constants.grouped
    return product.flop / reached


def attention_products(workload: Workload) -> tuple[Product, ...]:
    """Return the projections of one layer on a rank; latents are not cut by tensor parallelism."""
    tokens, tp = workload.micro_batch_tokens, workload.layout.tp
    hidden = workload.architecture.hidden_size
    attention = workload.architecture.attention
    matrices = attention.matrices(hidden)
    products: list[Product] = []
    for idx, (inner, columns) in enumerate(matrices):
        is_last = idx == len(matrices) - 1
        is_down = len(matrices) > 2 and inner == hidden and not is_last
        cut_inner = inner / tp if is_last else inner
        cut_columns = columns if is_last or is_down else columns / tp
        rows = tokens / tp if is_down else tokens  # sequence parallelism: latents of own tokens
        products.append(Product(rows=rows, columns=cut_columns, inner=cut_inner))
    return tuple(products)


def ffn_products(workload: Workload, *, inner_size: int) -> tuple[Product, ...]:
    """Return gate-and-up and down of a dense or shared FFN on a rank."""
    tokens, tp = workload.micro_batch_tokens, workload.layout.tp
    hidden = workload.architecture.hidden_size
    return (
        Product(rows=tokens, columns=2 * inner_size / tp, inner=hidden),
        Product(rows=tokens, columns=hidden, inner=inner_size / tp),
    )


def expert_tokens(workload: Workload) -> float:
    """Return the rows that the busiest rank's experts get together in a micro-batch."""
    architecture, layout = workload.architecture, workload.layout
    own = workload.micro_batch_tokens / layout.tp * architecture.num_experts_per_token
    return own * layout.etp * workload.expert_imbalance


def expert_products(workload: Workload) -> tuple[Product, ...]:
    """Return gate-and-up and down of the routed experts of a rank, as grouped products."""
    architecture, layout = workload.architecture, workload.layout
    experts = architecture.num_routed_experts / layout.ep
    rows = expert_tokens(workload) / experts
    hidden, inner = architecture.hidden_size, architecture.expert_ffn_size / layout.etp
    return (
        Product(rows=rows, columns=2 * inner, inner=hidden, count=experts),
        Product(rows=rows, columns=hidden, inner=inner, count=experts),
    )


def head_product(workload: Workload) -> Product:
    """Return the product of the head on a rank, always bf16."""
    architecture = workload.architecture
    return Product(
        rows=workload.micro_batch_tokens,
        columns=architecture.vocab_size / workload.layout.tp,
        inner=architecture.hidden_size,
        is_low=False,
    )


def attention_core_s(workload: Workload, *, hardware: Hardware, windowed: bool) -> float:
    """Return the forward seconds of one layer's scores and values on a rank."""
    architecture = workload.architecture
    attention, tokens = architecture.attention, workload.micro_batch_tokens
    keys = architecture.seen_keys(workload.sequence_tokens, windowed=windowed)
    if windowed:
        full = architecture.seen_keys(workload.sequence_tokens)
        keys = min(keys + WINDOW_BLOCK_TOKENS, full)
    sizes = attention.score_size + attention.value_size
    flop = 2 * keys * tokens * attention.num_heads / workload.layout.tp * sizes
    mean = sizes / 2
    reached = hardware.constants.attention * mean / (mean + ATTENTION_HALF_HEAD)
    if workload.attention_kernel == "torch":
        reached *= TORCH_ATTENTION
    return flop / (hardware.gpu.bf16_flop_per_s * reached)


def total_s(products: Sequence[Product], *, workload: Workload, hardware: Hardware) -> float:
    """Return the forward seconds of products, one after the other."""
    return sum(product_s(item, workload=workload, hardware=hardware) for item in products)
