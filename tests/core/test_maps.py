"""Laws of all maps: they undo, compose, and keep every product that crosses their axis."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qfx.core.maps import Diagonal, Map, Permute, Rotate, Shift, random_rotation

CHANNELS = 12
TOLERANCE = 1e-12  # sums of a dozen float64 terms of size one

MAPS: dict[str, Callable[[torch.Generator], Map]] = {
    "diagonal": lambda g: Diagonal(draw(CHANNELS, generator=g).exp()),
    "signed": lambda g: Diagonal(draw(CHANNELS, generator=g).exp() * (2 * torch.arange(CHANNELS).fmod(2) - 1)),
    "shift": lambda g: Shift(draw(CHANNELS, generator=g)),
    "permute": lambda g: Permute(torch.randperm(CHANNELS, generator=g)),
    "rotate": lambda g: random_rotation(CHANNELS, g),
}
LINEAR = [name for name in MAPS if name != "shift"]
every_map = pytest.mark.parametrize("name", MAPS)
every_linear_map = pytest.mark.parametrize("name", LINEAR)


def draw(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(name: str, seed: int = 0) -> Map:
    return MAPS[name](torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


@every_map
def test_the_inverse_undoes(name: str) -> None:
    change, x = make(name), draw(2, 5, CHANNELS)
    assert not close(change(x), x)
    assert close(change.inverse()(change(x)), x) and close(change(change.inverse()(x)), x)
    assert type(change.inverse()) is type(change)


@every_map
def test_then_is_one_after_the_other(name: str) -> None:
    first, second, x = make(name, 0), make(name, 1), draw(3, CHANNELS)
    assert close(first.then(second)(x), second(first(x)))
    assert close(first.then(first.inverse())(x), x)
    if name in ("permute", "rotate"):
        assert not close(second.then(first)(x), second(first(x)))  # the order counts


@every_linear_map
def test_a_writer_writes_mapped_values(name: str) -> None:
    change, w, x = make(name), draw(CHANNELS, 7), draw(4, 7)
    assert change.write(w).shape == w.shape
    assert close(x @ change.write(w).T, change(x @ w.T))


@every_linear_map
@pytest.mark.parametrize("lead", [(), (3,)], ids=["linear", "experts"])
def test_a_reader_reads_them_as_before(name: str, lead: tuple[int, ...]) -> None:
    change, w, x = make(name), draw(*lead, 9, CHANNELS), draw(*lead, 4, CHANNELS)
    assert change.read(w).shape == w.shape
    assert close(change(x) @ change.read(w).mT, x @ w.mT)


@every_linear_map
def test_what_is_written_and_read_is_the_same_product(name: str) -> None:
    change, writer, reader = make(name), draw(CHANNELS, 7), draw(9, CHANNELS)
    assert close(change.read(reader) @ change.write(writer), reader @ writer)
    assert not close(reader @ change.write(writer), reader @ writer)


@every_linear_map
def test_a_dual_keeps_its_products_with_the_written(name: str) -> None:
    change, q, k = make(name), draw(CHANNELS, 7), draw(CHANNELS, 8)
    x, y = draw(4, 7), draw(5, 8)
    scores = (x @ q.T) @ (y @ k.T).T
    assert change.dual(k).shape == k.shape
    assert close((x @ change.write(q).T) @ (y @ change.dual(k).T).T, scores)
    assert close(change.inverse().write(k), change.dual(k)) == (name in ("diagonal", "signed"))


def test_a_shift_leaves_its_readers_a_bias() -> None:
    change, w, x = make("shift"), draw(9, CHANNELS), draw(4, CHANNELS)
    assert isinstance(change, Shift)
    assert close(change(x) @ w.T + w @ change.offset, x @ w.T)


def test_maps_take_the_dtype_of_what_they_change() -> None:
    for name in MAPS:
        change = make(name)
        assert change(torch.randn(2, CHANNELS)).dtype == torch.float32
        if not isinstance(change, Shift):
            w = torch.randn(CHANNELS, CHANNELS)
            assert {change.write(w).dtype, change.read(w).dtype, change.dual(w).dtype} == {torch.float32}


def test_random_rotations_are_orthogonal_and_uniform() -> None:
    for n in (1, 2, 7, 64):
        q = random_rotation(n, torch.Generator().manual_seed(n)).matrix
        assert q.dtype == torch.float64 and close(q @ q.T, torch.eye(n, dtype=torch.float64))
        assert q.equal(random_rotation(n, torch.Generator().manual_seed(n)).matrix)
    generator = torch.Generator().manual_seed(0)
    entries = torch.stack([random_rotation(3, generator).matrix for _ in range(400)])
    # each entry has mean 0 and variance 1/3; QR alone would give the diagonal a sign
    assert entries.mean(0).abs().max() < 4 * (1 / 3 / 400) ** 0.5
    assert (entries.square().mean(0) - 1 / 3).abs().max() < 0.06
    assert isinstance(random_rotation(2, generator).inverse(), Rotate)
