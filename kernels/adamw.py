"""How does AdamW look with the state layout of TE's and apex's FusedAdam?

megatron-core's distributed optimizer saves and loads the state of a *FusedAdam*: `step` is a number
in the parameter group and each parameter has `exp_avg` and `exp_avg_sq` only
(distrib_optimizer.py:640-680, 818). torch.optim.AdamW keeps `step` as a tensor beside them, and
loading such a state fails with KeyError 'step'. `FlatAdamW` has the first layout and calls torch's
fused CPU kernel for the arithmetic, so its trajectory is torch.optim.AdamW's to the bit.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class FlatAdamW(torch.optim.Optimizer):
    """AdamW with `step` in the parameter group, the layout of TE's FusedAdam.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; layout: docs/decisions/0005.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        """Set the defaults of every parameter group.

        Args:
            params: parameters or parameter groups.
            lr: learning rate, unitless.
            betas: decay of the first and second moment, 0 <= beta < 1.
            eps: added to the root of the second moment.
            weight_decay: decoupled weight decay, multiplied by lr.
            adam_w_mode: must be True; L2-coupled Adam is not offered.

        Raises:
            ValueError: if `adam_w_mode` is False.
        """
        if not adam_w_mode:
            raise ValueError(
                "adam_w_mode=False given; only decoupled weight decay is offered: set it to True"
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return the closure's loss, if any."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        # The kernel reads one step tensor per parameter; ours lives in the group.
        steps = [torch.tensor(float(group["step"]), device=params[0].device)] * len(params)
        # torch has no public name for its fused kernel.
        torch._fused_adamw_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
