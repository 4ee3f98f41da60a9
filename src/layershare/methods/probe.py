"""Trying changes on a part of the calibration text: the model is run under them and stays as it is."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from layershare.model.arch import Linear, find_blocks
from layershare.model.depth import cut_layers
from layershare.model.weights import Weights
from layershare.plan.edits import Drop, Merge, kept_layers
from layershare.plan.evidence import Evidence
from layershare.plan.layout import origins


class Probe:
    """The whole model, in memory, and the first `samples` blocks of the calibration text.

    Raises `LayershareError` if the evidence has no text.
    """

    def __init__(self, evidence: Evidence, samples: int) -> None:
        tokens = evidence.text.tokens[:samples]
        self.spec = evidence.spec
        self.weights = Weights.of(evidence.weights.whole().eval())
        self.tokens = tokens.to(self.weights.device)

    @torch.no_grad()
    def loss(self, replaced: dict[str, Tensor]) -> float:
        """The mean negative log-likelihood of the next token, in nats, with other tensors in place of the named ones.

        Names and shapes are those of the state dict; infinite if it is not a number.
        """
        total = 0.0
        replaced = {name: tensor.to(self.weights.device) for name, tensor in replaced.items()}
        for block in self.tokens:
            options = {"input_ids": block[None], "use_cache": False}
            logits = functional_call(self.weights.model, replaced, (), options).logits
            total += cross_entropy(logits[0, :-1].float(), block[1:], reduction="sum").item()
        loss = total / (len(self.tokens) * (self.tokens.shape[1] - 1))
        return loss if math.isfinite(loss) else math.inf

    @torch.no_grad()
    def final_states(self, edits: Sequence[Drop | Merge]) -> Tensor:
        """What the blocks and the last norm give, [blocks, length, width], after dropping and merging whole blocks.

        The blocks that are left are used as they are, so that only merged tensors take memory.
        """
        model = self.weights.shell()
        name, blocks = find_blocks(model)
        kept = kept_layers(self.spec.n_layers, edits)
        model.base_model.set_submodule(name, nn.ModuleList(blocks[layer] for layer in kept))
        if len(kept) < self.spec.n_layers:
            cut_layers(model.config, kept)
        merged = {
            name.removeprefix(self.spec.base_prefix): self.weights.combination(sources)
            for name, sources in origins(self.spec, edits).items()
            if len(sources) > 1
        }
        states = []
        for block in self.tokens:
            options = {"input_ids": block[None], "use_cache": False}
            states.append(functional_call(model.base_model, merged, (), options).last_hidden_state)
        return torch.cat(states)


def truncated(linear: Linear, factors: tuple[Tensor, Tensor], rank: int) -> Tensor:
    """The first `rank` components of a factored weight, d_in × K and K × d_out, as the state dict stores it."""
    left, right = factors
    return linear.matrix(left[:, :rank] @ right[:rank])
