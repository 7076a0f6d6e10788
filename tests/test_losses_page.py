"""What the page on the losses offers in place of other libraries has their value and gradient."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtrast.benchmarks.kernels.peers import Loss, lightly_nt_xent, monai_nt_xent
from voxtrast.benchmarks.place import Cannot

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "losses.md"
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("make", [monai_nt_xent, lightly_nt_xent])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("images", [2, 31])
def test_the_drop_in_has_the_value_and_gradients_of(
    make: Callable[[float], Loss], temperature: float, images: int
) -> None:
    try:
        theirs = make(temperature)
    except Cannot as why:
        pytest.skip(str(why))
    of_page: dict[str, Any] = {}
    exec(compile(next(script for script in SCRIPTS if "def nt_xent" in script), "losses.md", "exec"), of_page)
    torch.manual_seed(0)
    views = [torch.randn(images, 24, requires_grad=True) for _ in range(2)]

    def found(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        value = loss(*views)
        return value, *torch.autograd.grad(value, views)

    expected = found(theirs)
    torch.testing.assert_close(
        found(lambda first, second: of_page["nt_xent"](first, second, temperature)), expected, rtol=1e-5, atol=1e-6
    )
