"""All that a fine-tuning step changes: weights, optimizer, moving average, and how far it is; to be saved and restored.

Restoring copies values into tensors that are laid out in memory as before: the same arithmetic on another layout may round in
another way.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.backbone import Classifier
from finetune_trainer.device import Device
from finetune_trainer.guard import MAX_LEVELS
from finetune_trainer.memory import MicroBatches
from finetune_trainer.schedule import Pace

Weights = dict[str, Tensor]
NUM_LATEST = 20
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Snapshot:
    """A learner at one moment."""

    tensors: Weights
    state: dict[str, Any]
    """JSON data."""


@dataclass
class Learner:
    """A model that is being trained."""

    model: Classifier
    forward: nn.Module
    """The model, or what wraps it to average the gradients of all processes."""
    optimizer: torch.optim.Optimizer
    average: Weights
    pace: Pace = field(default_factory=Pace)
    rate_scale: float = 1.0
    """Factor on all learning rates, below 1 after a rollback."""
    rollbacks: int = 0
    parts: int = 1
    """Into how many parts each batch is split."""
    levels: list[float] = field(default_factory=list)
    """The loss at the latest verdicts, by which the next one is judged."""
    recent: list[Tensor] = field(default_factory=list)
    """The losses since the last verdict."""
    latest: deque[Tensor] = field(default_factory=lambda: deque(maxlen=NUM_LATEST))
    """The losses whose mean people are told."""

    def capture(self, step_seconds: float) -> Snapshot:
        """Return what `restore` needs; the tensors are not copies."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self._list_trained():
            tensors |= {f"{moment}/{name}": self.optimizer.state[parameter][moment] for moment in _MOMENTS}
        state = {
            "pace": asdict(self.pace),
            "rateScale": self.rate_scale,
            "rollbacks": self.rollbacks,
            "parts": self.parts,
            "levels": self.levels,
            "recent": [float(loss) for loss in self.recent],
            "latest": [float(loss) for loss in self.latest],
            "stepSeconds": step_seconds,
        }
        return Snapshot(tensors, state)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> float:
        """Go back to a snapshot; return the time that a step took then."""
        state = snapshot.state
        self.pace = Pace(**state["pace"])
        self.rate_scale, self.rollbacks, self.parts = state["rateScale"], state["rollbacks"], max(self.parts, state["parts"])
        self.levels, self.recent = list(state["levels"]), self._place(state["recent"])
        # Snapshots of earlier versions lack it, and are good nevertheless.
        self.latest = deque(self._place(state.get("latest", state["recent"])), maxlen=NUM_LATEST)
        self.model.load_state_dict(_select(snapshot.tensors, "model/"))
        _copy(self.average, _select(snapshot.tensors, "average/"))
        for name, parameter in self._list_trained():
            kept = self.optimizer.state[parameter]
            kept["step"].fill_(self.pace.done)
            for moment in _MOMENTS:
                kept[moment].copy_(snapshot.tensors[f"{moment}/{name}"])
        return float(state["stepSeconds"])

    @torch.no_grad()
    def start_over(self, weights: Mapping[str, Tensor]) -> None:
        """Go back to the beginning: the weights that the fine-tuning started from, and no memory of steps."""
        self.model.load_state_dict(weights)
        _copy(self.average, weights)
        prepare_optimizer(self.optimizer)
        self.pace, self.levels, self.recent = Pace(), [], []
        self.latest.clear()

    def note_loss(self, loss: Tensor) -> None:
        """Take in the loss of a step."""
        self.recent.append(loss)
        self.latest.append(loss)

    def take_level(self) -> float:
        """Return the mean loss since the last verdict, and begin anew."""
        level = float(torch.stack(self.recent).mean())
        self.levels, self.recent = [*self.levels, level][-MAX_LEVELS:], []
        return level

    @torch.no_grad()
    def update_average(self, weight: float) -> None:
        """Move the average towards the weights; counters are copied."""
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, weight)
            else:
                self.average[name].copy_(tensor)

    def _place(self, losses: list[float]) -> list[Tensor]:
        return [torch.tensor(loss, device=self.model.head.weight.device) for loss in losses]

    def _list_trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter in self.optimizer.state]


def build_learner(
    model: Classifier, groups: list[dict[str, object]], *, sample: Tensor, memory: MicroBatches, device: Device
) -> Learner:
    """Return the model, whose inputs are like the sample, with a fresh optimizer and an average that starts at the weights."""
    optimizer = torch.optim.AdamW(groups, **device.optimizer_options)
    prepare_optimizer(optimizer)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Learner(model, memory.group.wrap(model, sample), optimizer, average, parts=memory.parts)


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give every weight its state as the first step would: a step then takes no more memory, so it cannot fail halfway."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in _MOMENTS},
            }


def compute_average_weight(stride: float, *, horizon: float) -> float:
    """Return how far the average moves in a step that covers `stride` of the schedule."""
    return 1 - math.exp(-stride / horizon)


def lay_out_like(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Weights:
    """Return the weights on the devices and in the memory layout of `like`."""
    return {name: torch.empty_like(like[name]).copy_(tensor) for name, tensor in weights.items()}


def _copy(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _select(tensors: Mapping[str, Tensor], prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
