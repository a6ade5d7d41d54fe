"""Makes transformers know folders of qfx, whichever of the two is imported first, and at no cost if one never is.

transformers finds the loader of a quantized folder in a table that it fills itself: it has no entry points, so a
package must put itself there before `from_pretrained` is called. Who writes `import qfx` has said enough; yet that may
not import transformers, which takes seconds, and transformers may come later. So a finder waits for one module,
`transformers.quantizers`: when it is imported, those finders find it that would have found it anyway, and `qfx.hub`
registers itself right after the module has run. Then the finder is gone. It answers None to every other name, and an
error of ours is a warning, never the end of somebody's import of transformers.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AWAITED = "transformers.quantizers"


def register_with_transformers() -> None:
    """Registers `qfx.hub` now if transformers' table is there, else when it is imported; a second call does nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):  # of a qfx imported before
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        importlib.import_module("qfx.hub")
    except Exception as e:  # a transformers without that table, or with another
        warnings.warn(
            f"qfx: transformers' from_pretrained will not load folders of qfx ({type(e).__name__}: {e}); "
            "qfx.load does, or install transformers>=5",
            stacklevel=2,
        )


class _Finder:
    """Finds the awaited module as it would be found without it, with a loader that also registers."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(self, spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Loads as another loader does, which takes its place as soon as the module is made."""

    def __init__(self, finder: _Finder, loader: Any) -> None:
        self.finder = finder
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # resources, source: whatever is asked of a spec that was only looked at

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()
