"""The verb that trains a smaller model."""

from pathlib import Path
from typing import Annotated

import typer

from layershare.cli.options import DEVICE, Folder, Length, Out, Trust, choices, given, text_option
from layershare.cli.output import print_evaluation, progress, quiet, show, tell
from layershare.healing.settings import Healing, Loss


def heal(
    folder: Folder,
    output: Out,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Settings (YAML); options here come before it.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="WHAT",
            autocompletion=choices(Healing, "train"),
            help="lora (default), factors, norms, full or deltas.",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="NAME",
            autocompletion=choices(Loss, "kind"),
            help="ce (default), distill from the original, or both.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the original's blocks by this model's step by step.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="The original, if the folder does not name it.")
    ] = None,
    text: Annotated[str | None, text_option("--text", "-t", help="As for compress; the part to train on.")] = None,
    length: Length = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Train on so many tokens.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", metavar="N", help="Train for so many epochs (default: 1).")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Blocks per step.")] = None,
    search: Annotated[
        int | None, typer.Option("--search", metavar="N", min=1, help="Try so many settings in short trainings first.")
    ] = None,
    test: Annotated[
        str | None, text_option("--eval", help="Measure before and after on the held-out part of a text.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
    trust: Trust = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a setting: lora.rank=16, compile=true. Repeatable."),
    ] = None,
) -> None:
    """Win back by training what compression lost.

    Leaves another Hugging Face folder; the same command continues an interrupted healing.
    """
    from accelerate import PartialState

    from layershare.healing.heal import heal_folder
    from layershare.healing.job import prepare_healing
    from layershare.healing.settings import read_healing

    quiet()
    wanted = {
        "model": folder,
        "teacher": teacher,
        "train": train,
        "loss.kind": loss,
        "text.text": text,
        "text.length": length,
        "text.tokens": tokens,
        "text.epochs": epochs,
        "optimizer.lr": lr,
        "batch_size": batch_size,
        "search.trials": search,
        "evaluation.text": test,
        "device": device,
        "trust_remote_code": trust or None,
    }
    job = prepare_healing(read_healing(recipe, given(**wanted), tuple(changes or ()), replace=replace))
    with progress() as (announce, note):
        healed = heal_folder(job, output, announce=announce, say=note)
    if not PartialState().is_main_process:
        return
    if (stages := healed.evaluation) is not None:
        for when, measured in (("Before", stages.before), ("After", stages.after)):
            show(f"{when} healing:")
            print_evaluation(measured)
    tell(f"The healed model is in {output}.")
