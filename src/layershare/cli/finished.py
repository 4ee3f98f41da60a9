"""The verbs for finished models."""

from os.path import isdir
from pathlib import Path
from typing import Annotated, Any

import typer

from layershare.cli.options import Blocks, Device, Dtype, Folder, Length, Out, Trust, given, one_of, text_option
from layershare.cli.output import progress, quiet, require_parent, show, tell
from layershare.errors import LayershareError
from layershare.recipe import Calibration, Recipe, make_as
from layershare.units import size


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", hidden=True)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a page about finished runs.

    What was done in each FOLDER, sizes, quality, speed, and the best of each size.
    """
    from layershare.report.page import write_report

    require_parent(output)
    write_report(folders, output)
    tell(f"The report is in {output}.")


def export(
    folder: Folder,
    output: Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            autocompletion=one_of("dense", "onnx", "openvino"),
            help="dense: a checkpoint for everything, as large as the original again, except where whole blocks are "
            "gone. onnx, openvino: a graph in float32 with what is shared in it once.",
        ),
    ],
    trust: Trust = False,
) -> None:
    """Write a model for other programs.

    As an ordinary checkpoint, or as a graph for ONNX Runtime or OpenVINO, which keeps it small.
    """
    from layershare.exporting import export

    with progress() as (announce, _):
        export(folder, output, to=to, trust_remote_code=trust, announce=announce)
    tell(f"The {to} model is in {output}.")


def quantize(
    folder: Folder,
    output: Out,
    bits: Annotated[int, typer.Option("--bits", metavar="N", help="Bits for each number: 8, 6, 5, 4, 3 or 2.")] = 4,
    group: Annotated[
        int | None, typer.Option("--group", metavar="N", help="Numbers that share a scale: by default 64.")
    ] = None,
    basis_bits: Annotated[
        int | None, typer.Option("--basis-bits", metavar="N", help="Bits of bases, if others: 5 beside 4, say.")
    ] = None,
    scheme: Annotated[
        str, typer.Option("--scheme", metavar="NAME", help="int, or floats of 4 bits: nvfp4 or mxfp4.")
    ] = "int",
    text: Annotated[
        str | None, text_option("--text", "-t", help="Round by what this text needs (GPTQ); as for compress.")
    ] = None,
    blocks: Blocks = None,
    length: Length = None,
    device: Device = Recipe.device,
    trust: Trust = False,
) -> None:
    """Store a model's matrices in few bits.

    2 to 8 bits a number, of a compressed model or any other. Leaves another Hugging Face folder.
    """
    from layershare.quantizing import quantize_folder

    given_text = given(text=text, blocks=blocks, length=length)
    if text is None and given_text:
        raise LayershareError("--blocks and --length are those of a text: name it with --text, or leave them out.")
    calibration = None if text is None else make_as(Calibration, given_text)
    how: dict[str, Any] = {"bits": bits, "group": group, "basis_bits": basis_bits, "scheme": scheme}
    how["calibration"] = calibration
    with progress() as (announce, _):
        done = quantize_folder(folder, output, **how, device=device, trust_remote_code=trust, announce=announce)
    tell(f"The matrices take {size(done.after)} instead of {size(done.before)}. The quantized model is in {output}.")


def verify(folder: Annotated[Path, typer.Argument(help="Folder that layershare wrote.")]) -> None:
    """Check that a folder is as it was written.

    Every file and every tensor that layershare wrote there is compared with its checksum in manifest.json.
    """
    from layershare.manifest import verify

    tell(str(verify(folder)))


def list_models(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of compressed models.")] = Path(),
) -> None:
    """List the models below a folder.

    All that were compressed, with sizes and results.
    """
    from layershare.report.listing import listing

    table, unreadable = listing(folder)
    show(table)
    for sentence in unreadable:
        tell(sentence)


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The beginning of the text.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", metavar="N", min=1, help="Tokens to add.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    dtype: Dtype = Recipe.dtype,
    device: Device = Recipe.device,
    trust: Trust = False,
) -> None:
    """Let a model continue a prompt."""
    from layershare.device import device_of
    from layershare.evaluate.generate import continue_text

    if isdir(prompt) and not isdir(folder):  # unlike pathlib's, these take text that is too long for a name
        raise LayershareError(f"'{prompt}' is a folder, '{folder}' is none: name the model first, then the prompt.")
    quiet()
    options: dict[str, Any] = {"temperature": temperature, "seed": seed, "dtype": dtype}
    place = device_of(device)
    print(continue_text(folder, prompt, tokens=tokens, device=place, trust_remote_code=trust, **options))
