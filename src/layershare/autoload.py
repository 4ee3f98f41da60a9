"""Lets transformers load our checkpoints in programs that never import this package.

torch calls `install` at the end of `import torch` (entry point group `torch.backends`; the environment variable
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off). It imports neither torch nor transformers: it waits for transformers
to import its table of quantization methods, and lets that table import our loader when a checkpoint asks for it.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
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
    """Acts when the awaited module has been executed, and then steps aside."""

    def __init__(self, awaited: str, act: Callable[[], None]) -> None:
        self.awaited, self.act = awaited, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                execute(module)
                self.act()

            spec.loader.exec_module = execute_and_act
        return spec


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Call `act` once the module of this name is imported, which is now if it is already."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


def install() -> None:
    """Wait for transformers; calling it again, or too late, does nothing."""
    waiting = any(isinstance(finder, _Finder) and finder.act is _open_tables for finder in sys.meta_path)
    if READER not in sys.modules and not waiting:
        # In a program that imports the tables before torch, they are half executed at this point.
        sys.meta_path.insert(0, _Finder(READER if TABLES in sys.modules else TABLES, _open_tables))
