"""What a stage of a training starts from."""

from ..methods import Method
from ..methods.stages import Moment
from .errors import UserError
from .weights import copy_into, find_weights, load_weights, matching

NO_FILE = ("previous", "initial")


def check_start(moment: Moment, method: Method) -> None:
    """Refuses (UserError) the weights file of a stage if it is missing or does not fit, before the first step."""
    if moment.stage.start in NO_FILE:
        return
    try:
        tensors, description = load_weights(find_weights(moment.stage.start))
        matching(method.transferable(), tensors, description.get("untrained", []))
    except UserError as error:
        raise UserError(f"stages[{moment.index}].start: {error}; or start from {' or '.join(NO_FILE)}") from None


def take_weights(path: str, method: Method) -> list[str]:
    """Copies pretrained tensors into the method, and names them."""
    tensors, description = load_weights(find_weights(path))
    untrained = description.get("untrained", [])
    copy_into(method.transferable(), tensors, untrained)
    return [name for name in tensors if name not in untrained]
