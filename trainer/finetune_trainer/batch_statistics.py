"""Batch normalisation over the batch of all processes, so that its statistics do not depend on how many there are.

Shapes: B pictures of this process, C channels.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from finetune_api.contract import DeviceType
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from finetune_trainer.device import Device
from finetune_trainer.distributed import Group


def share_batch_statistics(group: Group, device: Device) -> contextlib.AbstractContextManager[Any]:
    """Return the context for forward passes in train mode.

    It takes the place of the function that all layers of batch normalisation call, timm's with activations included; torch's own
    SyncBatchNorm replaces layers, does not know those, and does not run on CPUs.
    """
    # XLA has no gradient for the normalisation by statistics that are given (torch_xla 2.9), so it is spelt out.
    is_spelt_out = device.type is DeviceType.XLA
    return _Statistics(group, is_spelt_out=is_spelt_out) if group.size > 1 or is_spelt_out else contextlib.nullcontext()


class _Statistics(TorchFunctionMode):
    def __init__(self, group: Group, *, is_spelt_out: bool) -> None:
        super().__init__()
        self._group = group
        self._is_spelt_out = is_spelt_out

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Any = None,  # noqa: ANN401  torch knows no better
    ) -> Any:  # noqa: ANN401  as above
        options = options or {}
        if function is functional.batch_norm and options["training"] and self._group.size > 1:
            return self._normalise(*arguments, **options)
        if function is functional.batch_norm and not options["training"] and self._is_spelt_out:
            return _normalise_as_given(*arguments, **options)
        return function(*arguments, **options)

    def _normalise(
        self,
        x_BC: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,  # noqa: ARG002, FBT001  the signature of the function that it replaces
        momentum: float,
        eps: float,
    ) -> Tensor:
        y_BC: Tensor = _Normalise.apply(x_BC, weight, bias, running_mean, running_var, momentum, eps, self._group)
        return y_BC


def _normalise_as_given(
    x_BC: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    **_: Any,  # noqa: ANN401  what only training needs
) -> Tensor:
    y_BC = _standardise(x_BC, running_mean, (running_var + eps).rsqrt())
    if weight is not None and bias is not None:
        y_BC = y_BC * _spread(weight, x_BC) + _spread(bias, x_BC)
    return y_BC.to(x_BC.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,  # noqa: ANN401  torch's, with attributes at will
        x_BC: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: Group,
    ) -> Tensor:
        sums = _sum_channels(x_BC), torch.linalg.vector_norm(x_BC, dim=_list_others(x_BC), dtype=torch.float64).square()
        own_count = x_BC.numel() // x_BC.shape[1]
        totals = group.sum(torch.cat([*sums, sums[0].new_tensor([own_count])]))
        count = float(totals[-1])
        mean, square = (totals[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp_min(0.0)
        _update(running_mean, mean, momentum)
        _update(running_var, variance * (count / max(1.0, count - 1)), momentum)
        mean_C, invstd_C = mean.float(), (variance + eps).rsqrt().float()
        context.save_for_backward(x_BC, weight, mean_C, invstd_C)
        context.group, context.count = group, count
        y_BC = _standardise(x_BC, mean_C, invstd_C)
        if weight is not None and bias is not None:
            y_BC = y_BC * _spread(weight, x_BC) + _spread(bias, x_BC)
        return y_BC.to(x_BC.dtype)

    @staticmethod
    def backward(context: Any, dy_BC: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  as above
        x_BC, weight, mean_C, invstd_C = context.saved_tensors
        z_BC, dy_BC = _standardise(x_BC, mean_C, invstd_C), dy_BC.float()
        sums = torch.cat([_sum_channels(dy_BC), _sum_channels(dy_BC * z_BC)])
        mean_dy, mean_dyz = (context.group.sum(sums) / context.count).float().chunk(2)
        scale_C = invstd_C if weight is None else invstd_C * weight
        dx_BC = _spread(scale_C, x_BC) * (dy_BC - _spread(mean_dy, x_BC) - z_BC * _spread(mean_dyz, x_BC))
        # The gradients of the weights are this process's share, which the exchange of gradients adds up.
        dbias, dweight = (None, None) if weight is None else sums.to(weight.dtype).chunk(2)
        return dx_BC.to(x_BC.dtype), dweight, dbias, None, None, None, None, None


def _list_others(x_BC: Tensor) -> list[int]:
    return [0, *range(2, x_BC.ndim)]


def _sum_channels(x_BC: Tensor) -> Tensor:
    return x_BC.sum(_list_others(x_BC), dtype=torch.float64)


def _spread(values_C: Tensor, x_BC: Tensor) -> Tensor:
    return values_C.view(1, -1, *[1] * (x_BC.ndim - 2))


def _standardise(x_BC: Tensor, mean_C: Tensor, invstd_C: Tensor) -> Tensor:
    return (x_BC.float() - _spread(mean_C, x_BC)) * _spread(invstd_C, x_BC)


def _update(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.lerp_(value.to(running.dtype), momentum)
