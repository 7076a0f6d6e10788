"""A module in its DeepSpeed engine: steps, and full tensors by name in and out of it, whatever the ZeRO stage."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

OptimizerState = dict[str, dict[str, Tensor]]  # by the parameters' names


class Learner:
    """Steps as a plain loop takes them: a parameter that no loss of a step reaches stays as it is, moments and all.

    DeepSpeed gives such a parameter a gradient of zeros, with which an optimizer would decay it, and move it by what is
    left of earlier gradients. Under ZeRO 1 Adam counts the steps of a parameter group, not of each parameter.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self._parameters = _trained(self.module)
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
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def sound(self) -> Tensor:
        """1 where the gradients that this rank holds for the step are finite, else 0; (), on the device."""
        gradients = list(self._gradients())
        if not gradients:
            return torch.ones((), device=self.engine.device)
        # The largest: a sum of squares could overflow where no gradient does.
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, math.inf)])
        return largest.isfinite().all().float()

    def _gradients(self) -> Iterator[Tensor]:
        if not self.partitioned:
            yield from (each.grad for each in self._parameters.values() if each.grad is not None)
            return
        for group in self.engine.optimizer.averaged_gradients.values():
            yield from (each for each in group or [] if each is not None and each.numel() > 0)

    def drop(self) -> None:
        """Throws the gradients of the step away in place of the step: parameters and moments stay."""
        self._reached.clear()
        if self.partitioned:
            # What DeepSpeed does itself where it sees an overflow.
            zero = self.engine.optimizer
            zero.micro_step_id = -1
            zero.zero_grad(set_to_none=True)
            zero._release_preflattened_grad_buffers()
            for key in zero.averaged_gradients:
                zero.averaged_gradients[key] = zero.all_grad_tensors[key] = None
        else:
            for parameter in self._parameters.values():
                parameter.grad = None
        self.engine.micro_steps += 1  # where it counts the micro-batches of the next step from

    def step(self) -> None:
        """Takes the step that the gradients say."""
        untouched = [each for each in self._parameters.values() if each not in self._reached]
        self._reached.clear()
        with self._kept(untouched):
            self.engine.step()

    @contextlib.contextmanager
    def _kept(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        if not self.partitioned:
            for parameter in parameters:
                parameter.grad = None
            yield
            return
        before = [(tensor, tensor.detach().clone()) for tensor in self._slices(parameters)]
        yield  # where the step makes the first moments, those of zero gradients are zeros
        for tensor, value in before:
            tensor.copy_(value)

    def _slices(self, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        """The parameters, and what this rank holds of their float32 values and their moments."""
        for parameter in parameters:
            yield parameter.data
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # another rank's
                continue
            flat = self.engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            address = mapping.get_hp_fragment_address()
            for tensor in (flat, *self.engine.optimizer.optimizer.state.get(flat, {}).values()):
                if torch.is_tensor(tensor) and tensor.shape == flat.shape:
                    yield tensor.data.narrow(0, address.start, address.numel)

    @property
    def partitioned(self) -> bool:
        return hasattr(self.engine.optimizer, "single_partition_of_fp32_groups")

    def forget_moments(self) -> None:
        optimizer = self.engine.optimizer
        (optimizer.optimizer if self.partitioned else optimizer).state.clear()

    def load_module(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)
        self.parameters_changed()

    def parameters_changed(self) -> None:
        """After a change of the parameters from outside: ZeRO has float32 values of its own."""
        if self.partitioned:
            from deepspeed.utils import safe_set_full_fp32_param

            for parameter in self._parameters.values():
                safe_set_full_fp32_param(parameter, parameter.detach().float())

    def optimizer_state(self) -> OptimizerState:
        """Full tensors, the same for every ZeRO stage. Collective."""
        optimizer = self.engine.optimizer
        if not self.partitioned:
            return {
                name: {key: torch.as_tensor(value).detach().cpu().clone() for key, value in optimizer.state[p].items()}
                for name, p in self._parameters.items()
                if p in optimizer.state
            }
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = optimizer.optimizer
        state: OptimizerState = {}
        if not inner.state:
            return state
        _link_optimizer_state(optimizer)
        flat = optimizer.single_partition_of_fp32_groups[0]
        whole = [k for k, value in inner.state[flat].items() if torch.is_tensor(value) and value.shape == flat.shape]
        single = {k: torch.as_tensor(v).cpu().clone() for k, v in inner.state[flat].items() if k not in whole}
        for name, parameter in self._parameters.items():
            state[name] = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in whole} | single
        return state

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Puts full tensors back, whatever the ZeRO stage and the number of ranks that they were saved under."""
        if not self.partitioned:
            for name, values in state.items():
                parameter = self._parameters[name]
                self.engine.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in values.items()
                }
            return
        if not state:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.engine.optimizer
        first = next(iter(state.values()))
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {
                key: value.to(flat.device, copy=True) if value.ndim == 0 else torch.zeros_like(flat)
                for key, value in first.items()
            }
        _link_optimizer_state(zero)
        for name, values in state.items():
            parameter = self._parameters[name]
            for key, value in values.items():
                if value.ndim > 0:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _link_optimizer_state(zero: Any) -> None:
    """Links the parameters to their slices of the optimizer state.

    DeepSpeed does so once, after the first step of the first parameter group: the other groups have no state by then
    and stay without (0.19.8), and so does a state that was loaded before any step.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
