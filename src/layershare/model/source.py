"""From a model's name to config and tokenizer. A name is a folder, a hub id, or `sample`, the model that we ship."""

from importlib.resources import files
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.errors import LayershareError, unknown
from layershare.manifest import require_whole

SAMPLE = "sample"


def resolve(name: str | Path) -> str:
    """The folder or hub id that a name stands for.

    Raises `LayershareError` if it is a folder without a model, or one that has changed since it was written (weights
    are checked when they are opened), or a path that does not exist.
    """
    if str(name) == SAMPLE:
        return str(files("layershare") / "sample")
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LayershareError(f"The folder '{name}' is not a model: it has no config.json.")
        require_whole(path, weights=False)
        return str(path)
    if path.is_file():
        raise LayershareError(f"'{name}' is a file; name the folder of a model, or a hub id.")
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise LayershareError(f"There is no model folder '{name}'.")
    return str(name)


def read_config(name: str | Path) -> PreTrainedConfig:
    """The model's config. Raises `LayershareError` if there is no such model, or if it is damaged."""
    source = resolve(name)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if Path(source).is_dir():
            reason = " ".join(str(error).split())
            raise LayershareError(f"The config.json of '{name}' cannot be used: {reason}") from error
        nearby = [SAMPLE, *(path.parent.name for path in Path().glob("*/config.json"))]
        hint = str(unknown("model", str(name), nearby)).removesuffix(f"Known: {', '.join(sorted(nearby))}.")
        raise LayershareError(
            f"{hint.strip()} It is no folder here, and the hub does not have it or cannot be reached."
        ) from error


def read_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `LayershareError` if it has none."""
    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError, KeyError) as error:
        read_config(name)  # which says so if it is the model that is not there
        reason = str(error).strip().partition("\n")[0]
        raise LayershareError(f"The tokenizer of '{name}' cannot be loaded: {reason}") from error


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a model in memory, by the name that it was loaded by. Raises `LayershareError` without one."""
    name = model.name_or_path
    if not name or (Path(name).is_absolute() and not Path(name).exists()):
        raise LayershareError("This model was not loaded by a name, so its tokenizer is not known; give it, too.")
    return read_tokenizer(name)
