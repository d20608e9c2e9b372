"""In which row does each expert find its tokens, and how do they come back?

Each token is copied once for each expert that it chose, the copies are sorted by expert and inside
an expert by token, and each expert's rows are filled up with zeros to a multiple that its matrix
product wants (16, or 128 in FP8). `row_map` says where every copy stands, once a layer; `permute`
and `unpermute` follow it. Each is the other's gradient: copying a token to K rows and adding K rows
up to a token.

Sums over a token's rows go by rising expert in fp32 and are rounded once, so they are the same
however many tokens there are.

T tokens, E experts of this rank, K chosen (at most), R rows, D model.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from kernels.backend import triton_side
from kernels.fp8 import BLOCK_SIZE, Quantised, quantise_by_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMap:
    """Where each copy of each token stands; tensors are int64 throughout."""

    token_of_row: Tensor
    """`[R]`, the token of each row; -1: the row is padding."""
    rows_of_token: Tensor
    """`[T, K]`, the rows of each token, rising; -1 in place of those that it has fewer."""
    experts_of_token: Tensor
    """`[T, K]`, whose rows these are; any expert where there is none."""
    num_rows: Tensor
    """`[E]`, rows of each expert, padding included."""
    num_tokens: Tensor
    """`[E]`, those of them that are no padding."""
    multiple: int
    """What each of `num_rows` is a multiple of."""


_TENSORS = tuple(field.name for field in fields(RowMap) if field.name != "multiple")


def row_map(chosen_TE: Tensor, *, num_chosen: int, multiple: int) -> RowMap:
    """Return the rows of the tokens that chose this rank's experts.

    Args:
        chosen_TE: `[T, E]` bool.
        num_chosen: K, the most experts that a token chooses of these.
        multiple: what each expert's number of rows is a multiple of; 1: no padding. An expert that
            nobody chose has no row.

    Raises:
        ValueError: if a token chose more than K experts, or an argument is no such number.

    The host waits for the device here, for the number of rows, and nowhere else in this file.
    """
    if multiple < 1 or not 1 <= num_chosen <= chosen_TE.shape[1]:
        raise ValueError(
            f"multiple={multiple} and num_chosen={num_chosen} given, 1 or more and 1 to"
            f" {chosen_TE.shape[1]}, the experts, are allowed"
        )
    num_tokens_E = chosen_TE.sum(0)
    num_rows_E = (num_tokens_E + multiple - 1) // multiple * multiple
    most = chosen_TE.sum(1).amax() if len(chosen_TE) else num_tokens_E.new_zeros(())
    wanted = torch.stack((num_rows_E.sum(), most)).cpu()  # the host waits for the device
    num_rows, most_chosen = int(wanted[0]), int(wanted[1])
    if most_chosen > num_chosen:
        raise ValueError(
            f"num_chosen={num_chosen} given, but a token chose {most_chosen} experts: rows are"
            " padded by this map, leave moe_router_padding_for_fp8 off"
        )
    first_E = num_rows_E.cumsum(0) - num_rows_E
    row_TE = (first_E + chosen_TE.cumsum(0) - 1).masked_fill(~chosen_TE, num_rows)
    row_TK, expert_TK = (x[:, :num_chosen] for x in row_TE.sort(1))
    token_TK = torch.arange(len(chosen_TE), device=row_TK.device)[:, None].expand_as(row_TK)
    token_R = row_TK.new_full((num_rows + 1,), -1)  # the last one takes what is absent
    token_R.scatter_(0, row_TK.flatten(), token_TK.flatten())
    return RowMap(
        token_of_row=token_R[:num_rows],
        rows_of_token=row_TK.masked_fill(row_TK == num_rows, -1).contiguous(),
        experts_of_token=expert_TK.contiguous(),
        num_rows=num_rows_E,
        num_tokens=num_tokens_E,
        multiple=multiple,
    )


def permute(x_TD: Tensor, rows: RowMap) -> Tensor:
    """Return each expert's tokens, `[R, D]` in the dtype of `x_TD`, zeros as padding.

    Args:
        x_TD: `[T, D]` fp32 or bf16.
        rows: of the same tokens.

    Raises:
        ValueError: if there is another number of tokens; on a GPU, where triton is not installed.
    """
    _check(x_TD, len(rows.rows_of_token), "tokens")
    return _Permute.apply(x_TD.contiguous(), rows)  # type: ignore[no-any-return]  apply is untyped


def permute_quantised(
    x_TD: Tensor, rows: RowMap, *, dtype: torch.dtype, power_of_two_scales: bool
) -> Quantised:
    """Return each expert's tokens in FP8, by blocks of 1 x 128, for the first product.

    A token is quantised once, before it is copied: the bytes and scales are those of quantising
    `permute`'s rows, for an eighth of the work at K = 8. Padding is 0 with scale 1. Not
    differentiable: the gradient of `permute` is that of its sum over a token's rows, `unpermute`.

    Args:
        x_TD: `[T, D]` fp32 or bf16.
        rows: of the same tokens.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two_scales: round scales down to powers of two.

    Raises:
        ValueError: as `permute`.

    Source: kernels/fp8.py for scales and bytes.
    """
    _check(x_TD, len(rows.rows_of_token), "tokens")
    how: dict[str, Any] = {"dtype": dtype, "power_of_two_scales": power_of_two_scales}
    if x_TD.device.type != "cpu":
        return triton_side("permute").quantised(x_TD.contiguous(), rows, **how)
    token = quantise_by_blocks(x_TD, (1, BLOCK_SIZE), **how)
    return Quantised(
        _gathered(token.data.view(torch.uint8), rows, padding=0).view(dtype),
        _gathered(token.scale, rows, padding=1),
        _gathered(token.scale_inv, rows, padding=1),
        token.block,
    )


def permute_quantised_along_tokens(
    x_TD: Tensor, rows: RowMap, *, dtype: torch.dtype, power_of_two_scales: bool
) -> Quantised:
    """Return the copy of `permute`'s rows for the first product's dW, `[D, R]` in FP8.

    That product sums over an expert's rows, so a scale belongs to 128 rows and a column: the
    transpose of `quantise_by_blocks(rows, (128, 1))`. Other rows make other scales, so here every
    copy of a token is quantised for itself. Not differentiable, as `permute_quantised`.

    Args:
        x_TD: `[T, D]` fp32 or bf16.
        rows: of the same tokens, each expert's a multiple of 128.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two_scales: round scales down to powers of two.

    Raises:
        ValueError: as `permute`; if rows of two experts would share a scale.

    Source: kernels/fp8.py for scales and bytes.
    """
    _check(x_TD, len(rows.rows_of_token), "tokens")
    if rows.multiple % BLOCK_SIZE:
        raise ValueError(
            f"a row map of multiple={rows.multiple} given, a multiple of {BLOCK_SIZE} is allowed:"
            " rows of two experts would share a scale"
        )
    how: dict[str, Any] = {"dtype": dtype, "power_of_two_scales": power_of_two_scales}
    if x_TD.device.type != "cpu":
        return triton_side("permute").quantised_along_tokens(x_TD.contiguous(), rows, **how)
    turned_DR = _gathered(x_TD, rows, padding=0).t().contiguous()
    return quantise_by_blocks(turned_DR, (1, BLOCK_SIZE), **how)


def unpermute(x_RD: Tensor, rows: RowMap) -> Tensor:
    """Return the sum of each token's rows, `[T, D]` in the dtype of `x_RD`.

    Rows are not weighted: the router's weight is in them already (kernels/swiglu.py).

    Args:
        x_RD: `[R, D]` fp32 or bf16.
        rows: that they were made by. The gradient of padding is 0.

    Raises:
        ValueError: if there is another number of rows; on a GPU, where triton is not installed.
    """
    _check(x_RD, len(rows.token_of_row), "rows")
    return _Unpermute.apply(x_RD.contiguous(), rows)  # type: ignore[no-any-return]  apply is untyped


def permute_weights(weight_TE: Tensor, rows: RowMap) -> Tensor:
    """Return the router's weight of each row, `[R]`, 0 for padding; differentiable.

    Args:
        weight_TE: `[T, E]` fp32.
        rows: of the same tokens.

    Raises:
        ValueError: if there is another number of tokens.
    """
    _check(weight_TE, len(rows.rows_of_token), "tokens")
    num_rows = len(rows.token_of_row)
    place_TK = rows.rows_of_token.masked_fill(rows.rows_of_token < 0, num_rows)
    # one place more, for what is absent; each other place is written once
    weight_R = weight_TE.new_zeros(num_rows + 1).scatter(
        0, place_TK.flatten(), weight_TE.gather(1, rows.experts_of_token).flatten()
    )
    return weight_R[:num_rows]


def permute_reference(x_TD: Tensor, chosen_TE: Tensor, *, multiple: int) -> Tensor:
    """Return the same as `permute` by `row_map`, expert by expert."""
    parts: list[Tensor] = []
    for expert in range(chosen_TE.shape[1]):
        part = x_TD[chosen_TE[:, expert]]
        parts += [part, part.new_zeros(-len(part) % multiple, x_TD.shape[1])]
    return torch.cat(parts)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: RowMap) -> Tensor:
        _keep(ctx, rows)
        return _copied(x_TD, rows)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        return _added_up(grad_outputs[0].contiguous(), _kept(ctx)), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows: RowMap) -> Tensor:
        _keep(ctx, rows)
        return _added_up(x_RD, rows)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        return _copied(grad_outputs[0].contiguous(), _kept(ctx)), None


def _keep(ctx: Any, rows: RowMap) -> None:
    """Keep a map where autograd counts it, and frees it, as anything else that it keeps."""
    ctx.save_for_backward(*(getattr(rows, name) for name in _TENSORS))
    ctx.multiple = rows.multiple


def _kept(ctx: Any) -> RowMap:
    return RowMap(**dict(zip(_TENSORS, ctx.saved_tensors, strict=True)), multiple=ctx.multiple)


def _copied(x_TD: Tensor, rows: RowMap) -> Tensor:
    """Return the tokens in their rows."""
    if x_TD.device.type != "cpu":
        return triton_side("permute").copied(x_TD, rows)
    if native.computes(x_TD):
        x_RD = x_TD.new_empty(len(rows.token_of_row), x_TD.shape[1])
        native.call("take_rows", x_TD, rows.token_of_row, x_RD, *x_RD.shape)
        return x_RD
    return _gathered(x_TD, rows, padding=0)


def _gathered(x_TD: Tensor, rows: RowMap, *, padding: int) -> Tensor:
    x_RD = x_TD.index_select(0, rows.token_of_row.clamp_min(0))
    x_RD[rows.token_of_row < 0] = padding
    return x_RD


def _added_up(x_RD: Tensor, rows: RowMap) -> Tensor:
    """Return the sum of each token's rows."""
    if x_RD.device.type != "cpu":
        return triton_side("permute").added_up(x_RD, rows)
    if native.computes(x_RD):
        sum_TD = x_RD.new_empty(len(rows.rows_of_token), x_RD.shape[1])
        sizes = (*rows.rows_of_token.shape, x_RD.shape[1])
        native.call("add_rows", x_RD, rows.rows_of_token, sum_TD, *sizes)
        return sum_TD
    sum_TD = x_RD.new_zeros(len(rows.rows_of_token), x_RD.shape[1], dtype=torch.float32)
    if len(x_RD):
        for row_T in rows.rows_of_token.unbind(1):
            part_TD = x_RD.index_select(0, row_T.clamp_min(0)).float()
            sum_TD += part_TD.masked_fill_((row_T < 0)[:, None], 0.0)
    return sum_TD.to(x_RD.dtype)


def _check(x: Tensor, expected: int, what: str) -> None:
    if x.dim() != 2 or len(x) != expected:
        raise ValueError(
            f"tensor of shape {tuple(x.shape)} given for {expected} {what} of the row map:"
            f" [{expected}, ...] is allowed"
        )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{x.dtype} given, torch.float32 and torch.bfloat16 are allowed")
