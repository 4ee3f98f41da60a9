"""Make Hugging Face causal language models smaller by letting their layers share weights.

The public interface is what `__all__` lists; everything is imported when it is first used, so that importing the
package, as the command line's `--help` does, does not import torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layershare.api import compress, heal, make_plan, measure, quantize
    from layershare.errors import LayershareError, UnsupportedModelError
    from layershare.evaluate.divergence import Evaluation
    from layershare.exporting import export
    from layershare.manifest import Verified, verify
    from layershare.model.arch import Spec
    from layershare.model.describe import describe
    from layershare.model.hub import load, save
    from layershare.model.source import resolve
    from layershare.plan.edits import Place, Share
    from layershare.plan.plan import Plan

_HOME = {
    "compress": "api",
    "heal": "api",
    "measure": "api",
    "quantize": "api",
    "make_plan": "api",
    "Evaluation": "evaluate.divergence",
    "LayershareError": "errors",
    "UnsupportedModelError": "errors",
    "Verified": "manifest",
    "verify": "manifest",
    "Spec": "model.arch",
    "describe": "model.describe",
    "export": "exporting",
    "load": "model.hub",
    "save": "model.hub",
    "resolve": "model.source",
    "Place": "plan.edits",
    "Plan": "plan.plan",
    "Share": "plan.edits",
}

__all__ = [
    "Evaluation",
    "LayershareError",
    "Place",
    "Plan",
    "Share",
    "Spec",
    "UnsupportedModelError",
    "Verified",
    "compress",
    "describe",
    "export",
    "heal",
    "load",
    "make_plan",
    "measure",
    "quantize",
    "resolve",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("layershare")
    if name in _HOME:
        return getattr(import_module(f"layershare.{_HOME[name]}"), name)
    raise AttributeError(f"module 'layershare' has no attribute '{name}'")
