"""Two models can be compared, or teach each other, if they number the same tokens in the same way."""

from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.errors import LayershareError
from layershare.model.source import read_config, read_tokenizer


def require_same_vocabulary(
    role: Literal["teacher", "original"],
    other: PreTrainedModel | str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Raise `LayershareError` if the tokens of another model, in its role, are not those of config and tokenizer.

    Of a model in memory, or without a tokenizer, the numbers of tokens are compared alone.
    """
    if isinstance(other, PreTrainedModel):
        theirs, numbers = other.config, {}
    else:
        theirs = read_config(other, trust_remote_code=trust_remote_code)
        numbers = _tokens(other, trust_remote_code)
    size, ours = (each.get_text_config().vocab_size for each in (theirs, config))
    known = {} if tokenizer is None else tokenizer.get_vocab()
    clash = next((token for token, number in known.items() if numbers.get(token, number) != number), None)
    if size != ours:
        difference = f"{size} tokens, this model {ours}"
    elif clash is not None:
        difference = f"its token {clash!r} has another number"
    else:
        return
    raise LayershareError(f"The {role} has another vocabulary ({difference}); name the original with --{role}.")


def _tokens(name: str, trust_remote_code: bool) -> dict[str, int]:
    """Token -> number in a model's tokenizer; nothing if it comes without one."""
    try:
        return read_tokenizer(name, trust_remote_code=trust_remote_code).get_vocab()
    except LayershareError:
        return {}
