"""Models built so that it is known which of their parts can go."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from layershare.methods import make_method, plan_with
from layershare.model.arch import PARTS, Part
from layershare.model.describe import describe
from layershare.plan.edits import Edit
from layershare.plan.evidence import Evidence
from tests.families import CONFIGS


@torch.no_grad()
def silence(model: PreTrainedModel, layer: int, *parts: Part) -> None:
    """Make parts of a block add nothing to the residual stream; without parts, the block becomes the identity."""
    spec = describe(model)
    for part in parts or PARTS:
        for parameter in model.base_model.get_submodule(spec.part(layer, part)[-1].name).parameters():
            parameter.zero_()


@torch.no_grad()
def deep_llama(n_layers: int = 6, equal: Sequence[int] = ()) -> PreTrainedModel:
    """A random Llama of that many layers, each of which changes the hidden states much; those `equal` are one block."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = n_layers
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.model.layers.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    for layer in equal[1:]:
        model.model.layers[layer].load_state_dict(model.model.layers[equal[0]].state_dict())
    return model


def keep_without(model: PreTrainedModel, part: Part, *layers: int) -> float:
    """The `keep`, of the targets, that a model meets as soon as these layers are without a part."""
    spec = describe(model)
    parts = PARTS if part == "block" else (part,)
    gone = sum(x.parameters for layer in layers for each in parts for x in spec.part(layer, each))
    return 1 - gone / sum(x.parameters for x in spec.linears) + 1e-6


def edits_of(evidence: Evidence, name: str, keep: float, **options: Any) -> tuple[Edit, ...]:
    """What a method plans."""
    method = make_method(name, options)
    return plan_with(evidence.spec, name, method, keep, "targets", evidence).edits
