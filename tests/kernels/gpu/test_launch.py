"""What a `Launcher` does before it launches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

from qfx.kernels.gpu import launch


class Hashed:
    """Stands for a function under `@triton.jit`: its hash holds the callees' constants, of those hashed before."""

    constant = ""

    def __init__(self, fn: Any, callees: list[Hashed], constant: str = "") -> None:
        self.fn, self.callees, self.own = fn, callees, constant
        self.hash: str | None = None

    @property
    def cache_key(self) -> str:
        if self.hash is None:
            known = "".join(c.constant for c in self.callees)
            self.hash = f"{self.fn.__name__}({known}{''.join(c.cache_key for c in self.callees)})"
            self.constant = self.own + known
        return self.hash


def lowest() -> None: ...


def lower() -> None:
    _jit_lowest  # type: ignore[name-defined]  # noqa: B018, F821


def kernel() -> None:
    _module.inner._jit_lower  # type: ignore[name-defined]  # noqa: B018, F821


@pytest.mark.parametrize("first", [(), (0,), (1,), (2,), (1, 0)])
def test_hashes_do_not_depend_on_what_was_hashed_before(
    first: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever kernels came first, as long as all of them are settled."""
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "_settled", set())
    a = Hashed(lowest, [], "7")
    b = Hashed(lower, [a])
    c = Hashed(kernel, [b])
    module, inner = ModuleType("module"), ModuleType("inner")
    module.inner, inner._jit_lower = inner, b  # type: ignore[attr-defined]
    monkeypatch.setitem(globals(), "_jit_lowest", a)
    monkeypatch.setitem(globals(), "_module", module)
    for i in (*first, 2):
        launch.settle((a, b, c)[i])
    assert (a.cache_key, b.cache_key, c.cache_key) == ("lowest()", "lower(7lowest())", "kernel(7lower(7lowest()))")


def test_without_settling_they_do() -> None:
    a = Hashed(lowest, [], "7")
    assert Hashed(lower, [a]).cache_key == "lower(lowest())" and Hashed(lower, [a]).cache_key == "lower(7lowest())"
