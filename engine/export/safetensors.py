"""The weights as a safetensors file: of the whole network, or of its encoder alone."""

from pathlib import Path

from torch import Tensor

from ...methods.backbone import find_architecture, transferable_state
from ..errors import UserError
from ..weights import save_weights
from .card import Exported, card, card_file, refuse_existing, write_json
from .fit import examine
from .source import Source


def write_safetensors(source: Source, file: Path, *, force: bool = False) -> Exported:
    """Writes FILE under the network's own names, and its card; see `export`.

    The description inside names under `not_pretrained` what of the network pretraining left as it was.
    """
    about_file = _about_file(file)
    refuse_existing((file, about_file), force)
    tensors = transferable_state(source.network)
    class_name = find_architecture(source.config.architecture).class_name
    fit = examine(
        class_name, source.network.state_dict(), tensors,
        task_layers=source.task_layers, filled=source.untrained, partly=source.partly,
    )  # fmt: skip
    use = [
        "from safetensors.torch import load_file",
        f'network.load_state_dict(load_file("{file}"), strict=False)  # each tensor is stored under one of its names',
    ]
    save_weights(file, tensors, {**source.description, "not_pretrained": source.untrained})
    write_json(about_file, card(source, "safetensors", file, fit, use))
    lines = [f"{file}: {len(tensors)} names under the network's own keys", f"{about_file}: where the weights come from"]
    return Exported((file, about_file), fit, [*lines, *fit.lines()])


def write_encoder(source: Source, file: Path, *, force: bool = False) -> Exported:
    """Writes the encoder's tensors under the names that the encoder alone has, and the card; see `export`."""
    about_file = _about_file(file)
    refuse_existing((file, about_file), force)
    architecture = find_architecture(source.config.architecture)
    module = architecture.encoder_module
    encoder = source.network.get_submodule(module)
    prefix = f"{module}."
    tensors: dict[str, Tensor] = dict(encoder.state_dict())
    untrained, partly = (
        [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        for names in (source.untrained, source.partly)
    )
    class_name = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    fit = examine(class_name, encoder.state_dict(), tensors, filled=untrained, partly=partly)
    use = [
        "from safetensors.torch import load_model",
        f'load_model(network.{module}, "{file}")  # strict: refuses names that are missing or unexpected',
    ]
    description = {**source.description, "not_pretrained": untrained, "untrained": untrained, "module": module}
    save_weights(file, tensors, description)
    write_json(about_file, card(source, "encoder", file, fit, use))
    name = architecture.class_name.rpartition(".")[2]
    lines = [
        f"{file}: {len(tensors)} names, those of {name}.{module} without {prefix!r}",
        f"{about_file}: where the weights come from",
    ]
    return Exported((file, about_file), fit, [*lines, *fit.lines(), f"then: {use[1]}"])


def _about_file(file: Path) -> Path:
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file}: expected a name that ends in .safetensors, such as {file.with_suffix('.safetensors').name}"
        )
    return card_file(file)
