"""A model with fewer blocks is an ordinary model of its family: only its config has to say so."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from layershare.errors import UnsupportedModelError


def cut_layers(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Make `config` one of a model that has the blocks `kept` alone, in place.

    Lists with an entry per layer, such as `layer_types`, are cut along. Raises `UnsupportedModelError` if the config
    does not say how many layers there are.
    """
    if getattr(config, "num_hidden_layers", None) is None:
        raise UnsupportedModelError(f"The config of '{config.model_type}' does not count its layers: none can be cut.")
    n_layers = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == n_layers:
            setattr(config, name, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)
