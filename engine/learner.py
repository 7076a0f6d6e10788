"""A module in its DeepSpeed engine: steps, and full tensors by name in and out of it, whatever the ZeRO stage."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import gradients
from .loss_scale import LossScale
from .optimizers import keep, kept_of
from .pieces import Pieces

OptimizerState = dict[str, dict[str, Tensor]]  # by the parameters' names


class Learner:
    """Steps as a plain loop takes them: a parameter that no loss of a step reaches stays as it is, moments and all.

    DeepSpeed gives such a parameter a gradient of zeros, with which an optimizer would decay it, and move it by what is
    left of earlier gradients. Under ZeRO 1 to 3 Adam counts the steps of a parameter group, not of each parameter.

    Args:
        loss_scale: of float16; a step whose gradients it makes overflow is dropped on every rank.
    """

    def __init__(self, engine: Any, loss_scale: LossScale | None = None) -> None:
        self.engine, self.loss_scale = engine, loss_scale
        self.module: nn.Module = engine.module
        self._parameters = _trained(self.module)
        self._pieces = Pieces(engine.optimizer, self._parameters) if engine.zero_optimization_stage() > 0 else None
        self._scattered = engine.zero_optimization_stage() == 3
        self._gathered = False
        self._scale = 1.0  # of the gradients of the step under way
        self._reached: set[nn.Parameter] = set()
        for parameter in self._parameters.values():
            parameter.register_post_accumulate_grad_hook(self._reached.add)

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.engine(*arguments)
        return losses

    @property
    def rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = value

    def train(self, training: bool = True) -> None:
        self.module.train(training)

    def set_micro_batch(self, samples: int) -> None:
        """Of each rank; the number of micro-batches in a step stays."""
        self.engine.set_train_micro_batch_size(samples)

    def learn(self, loss: Tensor) -> None:
        """Gradients of one micro-batch; after the last one of a step come `sound` and `step` or `drop`."""
        self._scale = self.loss_scale.scale if self.loss_scale else 1.0
        gradients.backward(self.engine, loss, self._scale)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def sound(self) -> Tensor:
        """1 where the gradients that this rank holds for the step are finite, else 0; (), on the device."""
        return gradients.are_finite(self.engine)

    def drop(self) -> None:
        """In place of the step: parameters and moments stay as they are."""
        self._reached.clear()
        gradients.drop(self.engine)
        if self._pieces is not None:
            self._pieces.forget_gradients()

    def step(self) -> None:
        """Takes the step that the gradients say."""
        gradients.unscale(self.engine, self._scale)
        untouched = [name for name, each in self._parameters.items() if each not in self._reached]
        self._reached.clear()
        if self._pieces is None:
            for name in untouched:
                self._parameters[name].grad = None
            self.engine.step()
            return
        restore = self._pieces.keep(untouched)
        self.engine.step()
        restore()
        self._pieces.forget_gradients()

    @contextlib.contextmanager
    def whole(self, change: bool = False) -> Iterator[None]:
        """Within, the module's parameters are whole on every rank, also under ZeRO 3, and may be used past the engine.

        Not within a backward, and without a step of this learner. Collective.

        Args:
            change: the parameters are changed within, on all ranks alike; ZeRO has float32 values of its own.
        """
        if self._gathered or not self._scattered:
            assert not (change and self._gathered), "changes need a context of their own"
            yield
            if change and self._pieces:
                self._pieces.put(self._parameters)
            return
        from deepspeed import zero

        parameters: list[Any] = list(self.module.parameters())
        with zero.GatheredParameters(parameters, modifier_rank=0 if change else None):
            self._gathered = True
            for parameter in parameters:  # a forward within must not scatter them again
                parameter.ds_active_sub_modules.add(self)
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(self)
                self._gathered = False
            if change and self._pieces:
                self._pieces.put(self._parameters)

    def load_module(self, state: dict[str, Tensor]) -> None:
        with self.whole(change=True):
            self.module.load_state_dict(state)

    def forget_moments(self) -> None:
        if self._pieces is not None:
            self._pieces.state.clear()
            return
        self.engine.optimizer.state.clear()
        for group in self.engine.optimizer.param_groups:
            group.pop("step", None)  # of optimizers that count for a whole group

    def optimizer_state(self) -> OptimizerState:
        """Whole tensors on the CPU, the same for every ZeRO stage. Collective."""
        if self._pieces is None:
            kept = {name: kept_of(self.engine.optimizer, each) for name, each in self._parameters.items()}
            return {name: values for name, values in kept.items() if values}
        cut, numbers = self._pieces.moments()
        if not cut and not numbers:
            return {}
        state: OptimizerState = {
            name: {key: value.cpu().clone() for key, value in numbers.items()} for name in self._parameters
        }
        for key in cut:
            for name, tensor in self._pieces.gather(key).items():
                state[name][key] = tensor.cpu().clone()
        return state

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Puts whole tensors back, whatever the ZeRO stage and the number of ranks that they were saved under."""
        if self._pieces is None:
            for name, values in state.items():
                keep(self.engine.optimizer, self._parameters[name], values)
            return
        if not state:
            return
        # Of all parameters' steps the most: those that were reached late count with the others.
        numbers: dict[str, Tensor] = {}
        for values in state.values():
            for key, value in values.items():
                if value.ndim == 0:
                    numbers[key] = torch.maximum(numbers.get(key, value), value)
        cut = sorted({key for values in state.values() for key in values} - set(numbers))
        self._pieces.make_moments(cut, numbers)
        for key in cut:
            self._pieces.put({name: values[key] for name, values in state.items() if key in values}, key)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
