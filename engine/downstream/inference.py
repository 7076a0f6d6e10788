"""What a trained network says about a whole volume: MONAI's sliding window, mirrored where that is asked for."""

import itertools
from collections.abc import Callable

import psutil
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from ..errors import UserError
from ..gpus import note_unused_gpus

AXES = "dhw"  # toward superior, anterior, right
OVERLAP = 0.5


def predict_logits(
    network: nn.Module,
    image: Tensor,
    crop: tuple[int, ...],
    background: float,
    device: torch.device,
    *,
    overlap: float = OVERLAP,
    mirror: tuple[int, ...] = (),
) -> Tensor:
    """Logits of a whole volume.

    Args:
        image: (1, D, H, W) float32, as in the store; any size.
        crop: sides of the sliding window, as in training.
        background: what a volume smaller than the window is padded with.
        device: of the network. The volume and the sum of its windows stay on the CPU, whose memory is larger.
        overlap: of neighbouring windows, a share of their sides.
        mirror: axes, 0 to 2; the mean over all combinations of them, mirrored and mirrored back.

    Returns: (classes, D, H, W) float32 on the CPU.
    """
    network.eval()
    with torch.no_grad():
        logits = sliding_window_inference(
            image[None].cpu(),
            roi_size=crop,
            sw_batch_size=2,
            predictor=_mirrored(network, mirror),
            overlap=overlap,
            mode="gaussian",
            cval=background,
            sw_device=device,
            device=torch.device("cpu"),
        )
    assert isinstance(logits, Tensor)
    return logits[0]


def lacking_memory(classes: int, voxels: int, copies: int = 1) -> str | None:
    """What is lacking, in words, where float32 logits of a whole volume do not fit into the memory that is free."""
    needed = 4 * copies * classes * voxels
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    what = f"{classes} classes of {voxels / 1e6:.0f} million voxels take {needed / 1e9:.0f} GB of memory"
    return f"{what}, {available / 1e9:.0f} GB are free"


def is_out_of_memory(error: BaseException) -> bool:
    """Of torch: OutOfMemoryError on a GPU, RuntimeError of its allocator on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _mirrored(network: nn.Module, axes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    if not axes:
        return network
    combinations = [each for count in range(len(axes) + 1) for each in itertools.combinations(axes, count)]

    def mean(windows: Tensor) -> Tensor:
        total: Tensor = network(windows)
        for combination in combinations[1:]:
            dimensions = [axis + 2 for axis in combination]
            total = total + network(windows.flip(dimensions)).flip(dimensions)
        return total / len(combinations)

    return mean


def mirror_axes(text: str) -> tuple[int, ...]:
    """Axes from letters: "w" or "d,h,w"; none for the empty text. Raises: UserError."""
    letters = [each.strip().lower() for each in text.split(",")] if text.strip() else []
    if any(each not in AXES or len(each) != 1 for each in letters) or len(set(letters)) != len(letters):
        raise UserError(f"--mirror {text}: expected one or more of d, h, w, each once, for example d,h,w")
    return tuple(sorted(AXES.index(each) for each in letters))


def check_mirrored(axes: tuple[int, ...], flips: bool) -> None:
    """Raises: UserError where a network that never saw a mirrored image would have to look at some."""
    if axes and not flips:
        raise UserError(
            "--mirror: the network was trained without --flips, and takes left for right in a mirrored image; leave "
            "--mirror out, or fine-tune with --flips where the classes have no sides"
        )


def check_overlap(overlap: float) -> None:
    """Raises: UserError."""
    if not 0 <= overlap < 1:
        raise UserError(f"--overlap {overlap}: expected a share from 0 to below 1, for example {OVERLAP}")


def find_device(name: str) -> torch.device:
    """A torch device by its name; auto: the GPU where there is one, else the CPU.

    Raises: UserError where it cannot be computed on.
    """
    if name == "auto":
        note_unused_gpus()
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: not usable here ({str(error).splitlines()[0]}); take cpu") from error
    return device
