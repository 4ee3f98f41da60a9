"""The healing that is a part of a compression: all factors are distilled from the original before they are written."""

import math
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.text import Source, Text, block_length, load_text
from layershare.device import device_of, precision_of
from layershare.healing.job import HealJob, require_blocks
from layershare.healing.settings import Healing, Loss, Optimizer, Train, TrainingText
from layershare.model.source import read_config
from layershare.recipe import Recipe

STEP = 0.03
"""η·√width / removed. Adam's steps should fall with the width, weights fall with its root, so η falls with that, too;
and what is nearer to the original needs smaller ones. Larger ones first lose what they have to win back (benchmarks/
repair: widths of 256 and 576); a model of width 64, far from its original, was better with four times as much."""
BETA2 = 0.95
"""Of AdamW: gradients shrink tenfold in the first steps, and a longer memory of their squares would hold these back."""


def training_text(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    source: Source | None,
    calibration: Text,
    held_out: Text,
) -> Text:
    """The whole text of a recipe's calibration, at the end of it the blocks that are held out, to be distilled on.

    `source` is given in place of the text that the recipe names. Raises `LayershareError` as `load_text`, and for one
    that is too short.
    """
    options, distill = recipe.calibration, recipe.distill
    assert distill is not None
    length = block_length(config, options.length)
    whole = load_text(
        options.text if source is None else source,
        tokenizer,
        split="train",
        blocks=None,
        length=length,
        seed=options.seed,
        vocabulary=config.get_text_config().vocab_size,
    )
    # Drawn by the same seed, all begin with the same blocks.
    text = whole.with_last(len(calibration.tokens), len(held_out.tokens))
    keys = ("distill.", "calibration.length", "distill.tokens")
    require_blocks(text, len(held_out.tokens), distill.batch_size, distill.steps(length), keys)
    return text


def distillation(
    recipe: Recipe,
    folder: Path,
    train: Train,
    removed: float,
    text: Text,
    held_out: int,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
) -> HealJob:
    """The healing that distils the compressed model in `folder` as a recipe says; `train`: which parameters.

    `removed`: which part of the targets' parameters is gone. `text`: from `training_text`, so many blocks of which are
    `held_out`. `teacher`: the original, if it is in memory.
    """
    options, device = recipe.distill, device_of(recipe.device)
    assert options is not None
    config = read_config(folder, trust_remote_code=recipe.trust_remote_code)
    lr = options.lr or STEP * max(removed, 0.01) / math.sqrt(config.get_text_config().hidden_size)
    length = text.tokens.shape[1]
    healing = Healing(
        model=str(folder),
        train=train,
        loss=Loss("distill"),
        text=TrainingText(
            recipe.calibration.text, length, options.tokens, held_out=held_out, seed=recipe.calibration.seed
        ),
        optimizer=Optimizer(lr=lr, relative=True, beta2=BETA2),
        batch_size=options.batch_size,
        precision=precision_of("auto", device),
        device=device,
        trust_remote_code=recipe.trust_remote_code,
    )
    return HealJob(
        healing=healing,
        folder=folder,
        device=device,
        config=config,
        tokenizer=tokenizer,
        teacher=recipe.model if teacher is None else teacher,
        text=text,
        evaluator=None,
        steps=options.steps(length),
        micro=math.gcd(options.batch_size, recipe.calibration.batch_size),
        processes=1,
    )
