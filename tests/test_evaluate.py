"""Perplexity: of models whose figure is known, and against a plain loop."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qfx.core.errors import QfxError
from qfx.evaluate import perplexity

VOCAB = 11
IDS = torch.randint(VOCAB, (103,), generator=torch.Generator().manual_seed(1))


class Uniform(nn.Module):
    """Gives every token the same probability, in one of the forms that models answer in."""

    def __init__(self, form: str = "tensor", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(7.0, dtype=dtype))
        self.form = form

    def forward(self, input_ids: Tensor) -> object:
        assert not self.training and input_ids.dtype == torch.int64
        logits = self.logit.expand(*input_ids.shape, VOCAB)
        return {"tensor": logits, "tuple": (logits, None), "object": SimpleNamespace(logits=logits)}[self.form]


class Recurrent(nn.Module):
    """A causal model that depends on all earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, VOCAB)
        self.config = SimpleNamespace(max_position_embeddings=32)

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        assert not use_cache
        return self.head(self.dropout(self.embed(input_ids)).cumsum(1))


def plain_loop(model: nn.Module, window: int, overlap_one: bool) -> tuple[float, int]:
    losses, begin = [], 0
    while begin + window + overlap_one <= len(IDS):
        logits = model.eval()(IDS[None, begin : begin + window], use_cache=False)[0]
        for t in range(window if overlap_one else window - 1):
            losses.append(-F.log_softmax(logits[t].double(), -1)[IDS[begin + t + 1]].item())
        begin += window
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("form", ["tensor", "tuple", "object"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_uniform_guess_costs_the_vocabulary(form: str, dtype: torch.dtype) -> None:
    found = perplexity(Uniform(form, dtype), IDS, window=10)
    assert found.value == pytest.approx(VOCAB, rel=1e-6)
    assert (found.tokens, found.windows) == (90, 10) and found.seconds >= 0
    assert str(found) == "11.0000 (90 tokens in 10 windows)"


@pytest.mark.parametrize("overlap_one", [False, True])
@pytest.mark.parametrize("window", [2, 17, 20, 32])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_it_is_the_plain_loop(window: int, batch_size: int, overlap_one: bool) -> None:
    model = Recurrent()
    options = {"window": window, "batch_size": batch_size, "overlap_one": overlap_one}
    found = perplexity(model, IDS, **options)
    wanted, tokens = plain_loop(model, window, overlap_one)
    assert found.value == pytest.approx(wanted, rel=1e-5) and found.tokens == tokens


def test_forms_of_the_text() -> None:
    model, tokenizer = (
        Uniform(),
        SimpleNamespace(encode=lambda text, add_special_tokens: SimpleNamespace(ids=[int(c) for c in text])),
    )
    for ids in (IDS, IDS[None], IDS.int(), IDS.tolist()):
        assert perplexity(model, ids, window=10).tokens == 90
    assert perplexity(model, "0123456789", tokenizer, window=5, overlap_one=True).tokens == 5
    assert perplexity(model, IDS, window=10, max_windows=3).windows == 3
    assert perplexity(lambda input_ids: model.eval()(input_ids), IDS, window=10).tokens == 90


def test_the_mode_of_each_module_is_kept() -> None:
    model = Recurrent().train()
    model.embed.eval()
    perplexity(model, IDS, window=8)
    assert model.training and model.dropout.training and not model.embed.training


def test_a_model_from_export() -> None:
    example = {"input_ids": IDS[None, :8], "use_cache": False}
    exported = torch.export.export(Recurrent().eval(), (), example).module()
    assert (
        perplexity(
            lambda input_ids: exported(input_ids=input_ids, use_cache=False), IDS, window=8, batch_size=1
        ).windows
        == 12
    )


def test_a_loss_over_the_largest_exponent_is_infinite() -> None:
    def certain(input_ids: Tensor) -> Tensor:
        return F.one_hot(input_ids * 0, 2).float() * 1e4  # never what comes next

    assert perplexity(certain, torch.ones(10, dtype=torch.int64), window=5).value == math.inf


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[:0], {}, "the text is empty"),
        ([], {}, "the text is empty"),
        (IDS[:5], {"window": 8}, "5 tokens, a window takes 8"),
        (IDS[:8], {"window": 8, "overlap_one": True}, "8 tokens, a window takes 9"),
        (IDS, {"window": 33}, "window 33; the model has 32 positions, use 32"),
        (IDS, {"window": 1}, "window 1"),
        (IDS, {"window": 8, "max_windows": 0}, "max_windows 0"),
        (IDS, {"window": 8, "batch_size": 0}, "batch_size is 0"),
        (IDS.float(), {"window": 8}, "token ids are integers"),
        (IDS.view(1, 1, -1), {"window": 8}, "token ids are integers"),
        ("text", {"window": 8}, "needs a tokenizer"),
    ],
)
def test_what_cannot_be_measured_is_refused(ids: object, options: dict, message: str) -> None:
    with pytest.raises(QfxError, match=message):
        perplexity(Recurrent(), ids, **{"window": 16} | options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    model = Uniform()
    nn.init.constant_(model.logit, value)
    with pytest.raises(QfxError, match="loss of windows 0 to 3 is nan"):
        perplexity(model, IDS, window=10)
    assert model.training


def test_there_is_no_bar_without_a_terminal(capfd: pytest.CaptureFixture) -> None:
    perplexity(Uniform(), IDS, window=10)
    assert capfd.readouterr() == ("", "")
