"""Lets transformers load our checkpoints in programs that never import this package.

torch calls `install` at the end of `import torch` (entry point group `torch.backends`; the environment variable
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off). It imports neither torch nor transformers: it waits for transformers
to import its table of quantization methods, and lets that table import our loader when a checkpoint asks for it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
READER = "transformers.modeling_utils"  # imports the tables' module, and reads them for every model
METHOD = "layershare"


class _Table(dict[str, Any]):
    """A table of transformers that imports our loader, which registers itself, when our name is looked up."""

    def __contains__(self, key: object) -> bool:
        if key == METHOD and not super().__contains__(key):
            importlib.import_module("layershare.model.hub")
        return super().__contains__(key)


def _open_tables() -> None:
    module = sys.modules[TABLES]
    for name in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        setattr(module, name, _Table(vars(module)[name]))


class _Finder(MetaPathFinder):
    """Opens the tables when the awaited module has been executed, and then steps aside."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_open(module: ModuleType) -> None:
                execute(module)
                _open_tables()

            spec.loader.exec_module = execute_and_open
        return spec


def install() -> None:
    """Wait for transformers; calling it again, or too late, does nothing."""
    if READER not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # In a program that imports the tables before torch, they are half executed at this point.
        sys.meta_path.insert(0, _Finder(READER if TABLES in sys.modules else TABLES))
