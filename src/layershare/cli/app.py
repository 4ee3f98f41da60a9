"""The verbs, and how the command ends."""

import sys
import warnings
from typing import Annotated, Any

import typer

from layershare.cli.compressing import calibrate, compress, methods, plan, run
from layershare.cli.finished import export, generate, list_models, quantize, report, verify
from layershare.cli.healing import heal
from layershare.cli.measuring import bench, evaluate
from layershare.cli.output import complain
from layershare.console import speak_any_encoding
from layershare.errors import LayershareError

app = typer.Typer(
    help="Make Hugging Face causal language models smaller by letting their layers share weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VERBS = {
    "run": run,
    "compress": compress,
    "plan": plan,
    "methods": methods,
    "calibrate": calibrate,
    "heal": heal,
    "quantize": quantize,
    "eval": evaluate,
    "bench": bench,
    "report": report,
    "export": export,
    "verify": verify,
    "ls": list_models,
    "generate": generate,
}
"""In the order in which `--help` shows them."""
for name, verb in VERBS.items():
    app.command(name)(verb)


def main() -> None:
    """Entry point: mistakes of the user end in one sentence and exit code 2."""
    speak_any_encoding()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app()
        except LayershareError as error:
            _end(error)
        except OSError as error:
            if error.filename is None:
                raise
            _end(LayershareError(f"'{error.filename}' cannot be used ({error.strerror}); name something else."))


def _end(error: LayershareError) -> None:
    complain(f"Error: {error}", "red")
    sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        complain(f"Warning: {message}", "yellow")


def _version(show: bool) -> None:
    if show:
        from layershare import __version__

        print(f"layershare {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options before the verb."""
