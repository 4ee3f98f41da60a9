"""The model families that must work, each as a tiny random model: `CONFIGS["llama"]()` is its configuration.

Width 32, 4 layers (so that groups of 2, 3 and 4 can be formed), 160 tokens; grouped-query attention (4 query
heads, 2 key-value heads) in every family that has it.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 160
LAYERS = 4
WIDTH = 32

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_HEADS = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 56}
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
_GQA = {"num_key_value_heads": 2, "max_position_embeddings": 128}
_HEAD_DIM = {"head_dim": 8}
_GEMMA = {**_HEADS, **_GQA, "head_dim": 16}
_GEMMA2 = {**_GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 16}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}


def _family(model_type: str, *options: dict[str, Any], **more: Any) -> Callable[[], PreTrainedConfig]:
    merged = {**_TOKENS, **{key: value for option in options for key, value in option.items()}, **more}
    return lambda: AutoConfig.for_model(model_type, **merged)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _family("llama", _HEADS, _GQA),
    "mistral": _family("mistral", _HEADS, _GQA, sliding_window=16),
    "qwen2": _family("qwen2", _HEADS, _GQA),
    "qwen3": _family("qwen3", _HEADS, _GQA, _HEAD_DIM),
    "gemma": _family("gemma", _GEMMA),
    "gemma2": _family("gemma2", _GEMMA2, _SLIDING),
    "gemma3_text": _family("gemma3_text", _GEMMA2, _SLIDING),
    "phi": _family("phi", _HEADS, _GQA),
    "phi3": _family("phi3", _HEADS, _GQA),
    "opt": _family(
        "opt",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        ffn_dim=56,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=128,
    ),
    "gpt2": _family("gpt2", _GPT),
    "gpt_neox": _family("gpt_neox", _HEADS, max_position_embeddings=128),
    "gptj": _family("gptj", _GPT, rotary_dim=4),
    "bloom": _family("bloom", hidden_size=WIDTH, n_layer=LAYERS, n_head=4),
    "falcon": _family(
        "falcon",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "olmo2": _family("olmo2", _HEADS, _GQA),
    "granite": _family("granite", _HEADS, _GQA),
    "starcoder2": _family("starcoder2", _HEADS, _GQA),
    "stablelm": _family("stablelm", _HEADS, _GQA),
    "cohere": _family("cohere", _HEADS, _GQA),
    "smollm3": _family("smollm3", _HEADS, _GQA),
    "glm4": _family("glm4", _HEADS, _GQA, _HEAD_DIM),
}


_PARALLEL = "runs attention and MLP side by side"
_SANDWICH = "norms what its sub-layers write"
NOT_SLICED = {
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "glm4": _SANDWICH,
    "olmo2": "no norm stands directly before",
    "phi": _PARALLEL,
    "gpt_neox": _PARALLEL,
    "gptj": _PARALLEL,
    "falcon": _PARALLEL,
    "cohere": _PARALLEL,
    "bloom": "'transformer.word_embeddings_layernorm' stands between its embeddings and its first block",
}
"""The families that SliceGPT does not fit, and why."""


OPTIONS: dict[str, dict[str, Any]] = {
    "asvd": {"ratios": 1, "samples": 1},
    "auto": {"compare": False},
    "bolaco": {"trials": 3, "samples": 1},
    "delta": {"protect": 0},
    "laco": {"merged": 2, "interval": 1, "samples": 1},
}
"""What a method is given here that is not its default: what a tiny model has room for, in little time."""


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """A random causal LM of the family in evaluation mode; biases and norms are not trivially 0 or 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or CONFIGS[family](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def tokens(batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, `[batch, length]`, without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
