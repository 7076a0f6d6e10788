"""The loss scale of float16: its gradients are small enough to vanish, so the loss is multiplied before backward.

Dynamic, as in Micikevicius et al. (2018) and torch's GradScaler: halved where a gradient overflowed, doubled after many
steps in a row that were whole. Always a power of two, so that scaling and unscaling round nothing. DeepSpeed's own
(0.19) looks at each rank's slice and at each parameter group alone under ZeRO: its ranks come apart.
"""

from .errors import UserError

INITIAL = 2.0**16
LARGEST = 2.0**24
GROWTH_STEPS = 2000


class LossScale:
    """The scale that the next loss is multiplied by, the same on every rank."""

    def __init__(self) -> None:
        self.scale = INITIAL
        self.good_steps = 0  # in a row

    def update(self, finite: bool) -> None:
        """After each step, or what would have been one.

        Raises: UserError where a gradient overflows without any scaling.
        """
        if finite:
            self.good_steps += 1
            if self.good_steps >= GROWTH_STEPS:
                self.scale, self.good_steps = min(self.scale * 2, LARGEST), 0
            return
        if self.scale <= 1:
            raise UserError(
                "train.autocast: gradients overflow float16 although the loss scale has fallen to 1; the last "
                "checkpoint is whole. Lower optimizer.learning_rate, or start anew with train.autocast=bfloat16"
            )
        self.scale, self.good_steps = self.scale / 2, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": float(self.good_steps)}

    def load(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = state["scale"], int(state["good_steps"])
