import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.zoo import KINDS, ZOO
from tests.zoo.decoders import DECODERS
from tests.zoo.others import OTHERS
from tests.zoo.user_modules import USER_MODULES


def outputs(model: nn.Module, kwargs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(**kwargs)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", ZOO)
def test_an_entry_is_hard_finite_and_the_same_twice(name: str) -> None:
    model, kwargs = ZOO[name].load()
    for key, param in model.named_parameters():
        # A constant vector is a gain of one or a bias of zero that was not redrawn.
        assert param.numel() <= 1 or param.std() > 0, key
        assert param.dtype is torch.float32, key
    first, second = outputs(model, kwargs), outputs(*ZOO[name].load())
    assert first
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
    # Outputs that hardly vary would hide an error.
    assert first[0].std() > 0.1


def test_every_row_has_its_own_name_and_every_kind_is_there() -> None:
    assert len(ZOO) == len(DECODERS) + len(OTHERS) + len(USER_MODULES)
    assert {entry.kind for entry in ZOO.values()} == set(KINDS)
