"""Let a model talk."""

from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from layershare.calibrate.text import Text, require_known
from layershare.device import dtype_of
from layershare.errors import LayershareError, unknown
from layershare.foreign import reading
from layershare.model.hub import load
from layershare.model.modes import evaluating, greedy
from layershare.model.source import read_config, read_tokenizer
from layershare.recipe import Dtype

LONGEST = 1 << 20
"""Tokens that a model without a limit of its own may be asked for."""
SAMPLES = 3
PROMPT_TOKENS = 24
SAMPLE_TOKENS = 40


def continue_text(
    folder: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> str:
    """The prompt and at most `tokens` tokens that the model adds to it, the likeliest ones at temperature 0.

    Raises `LayershareError` if there is no model or tokenizer in `folder`, the prompt is empty, or the text would be
    longer than the model's context.
    """
    if dtype not in get_args(Dtype):
        raise unknown("dtype", dtype, get_args(Dtype))
    if temperature != 0 and not 0.01 <= temperature <= 1000:
        raise LayershareError(f"A temperature of {temperature} cannot be sampled at; give 0, or 0.01 to 1000.")
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    dtype = dtype_of(dtype, device, read_config(folder, **trust))
    model = load(folder, dtype=dtype, device_map=device, **trust)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise LayershareError("The prompt has no tokens; give the beginning of a text.")
    require_known(int(ids.max()), model.config.get_text_config().vocab_size)
    require_context(model.config, ids.shape[1], tokens)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    set_seed(seed)
    output = continue_tokens(model, ids, tokens, tokenizer, **sampling)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def compare_samples(
    model: PreTrainedModel, original: PreTrainedModel, text: Text, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """How model and original continue the beginnings of a few blocks, always with the likeliest token.

    Each sample has a `prompt` and what `model` and `original` add to it; none is longer than a block of the text.
    """
    blocks, length = text.tokens.shape
    begin = min(PROMPT_TOKENS, length // 2)
    prompts = text.tokens[sorted({i * (blocks - 1) // (SAMPLES - 1) for i in range(SAMPLES)}), :begin]
    new = min(SAMPLE_TOKENS, length - begin)
    continued = []
    for each in (model, original):
        with greedy(each):
            continued.append(continue_tokens(each, prompts, new, tokenizer)[:, begin:].cpu())
    ours, theirs = continued
    columns = (tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (prompts, ours, theirs))
    return [dict(zip(("prompt", "model", "original"), row, strict=True)) for row in zip(*columns, strict=True)]


def require_context(config: PreTrainedConfig, prompt: int, new: int) -> None:
    """Raise `LayershareError` if prompt and new tokens do not fit into a model's context."""
    context = getattr(config, "max_position_embeddings", None) or LONGEST  # models with ALiBi have no limit
    if prompt + new > context:
        raise LayershareError(f"{prompt} + {new} tokens do not fit: this model takes {context}; ask for fewer tokens.")


def continue_tokens(
    model: PreTrainedModel, prompts: Tensor, new: int, tokenizer: PreTrainedTokenizerBase, **sampling: Any
) -> Tensor:
    """Prompts [rows, length] with at most `new` tokens added to each; rows that end earlier are padded.

    Raises `LayershareError` if the model cannot generate, as with settings of its own that make no sense.
    """
    prompts = prompts.to(model.device)
    unusable = reading("The model with its generation_config.json", "repair or delete that file, or ask for less")
    with evaluating(model), torch.no_grad(), unusable:
        return model.generate(  # pyright: ignore[reportCallIssue]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            pad_token_id=tokenizer.eos_token_id,
            tokenizer=tokenizer,  # where the model's settings have stop strings
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            **sampling,
        )
