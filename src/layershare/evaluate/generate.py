"""Let a model talk."""

from pathlib import Path
from typing import get_args

import torch
from transformers import set_seed

from layershare.errors import unknown
from layershare.model.hub import load
from layershare.model.source import read_tokenizer, resolve
from layershare.recipe import Dtype


def continue_text(
    folder: str | Path, prompt: str, *, tokens: int = 64, temperature: float = 0.0, seed: int = 0, dtype: str = "auto"
) -> str:
    """The prompt and at most `tokens` tokens that the model adds to it, the likeliest ones at temperature 0.

    Raises `LayershareError` if there is no model or tokenizer in `folder`.
    """
    if dtype not in get_args(Dtype):
        raise unknown("dtype", dtype, get_args(Dtype))
    tokenizer = read_tokenizer(folder)
    model = load(resolve(folder), dtype=dtype).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    set_seed(seed)
    with torch.no_grad():
        output = model.generate(  # pyright: ignore[reportCallIssue]
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
