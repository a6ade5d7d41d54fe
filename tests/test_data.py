"""Calibration batches: what is taken, and what each refusal says."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedTokenizerFast

from qfx.core.errors import CalibrationError
from qfx.data import batches, read_text, text_batches, token_ids

NAN = float("nan")
IDS = torch.arange(12).view(3, 4)


def make_tokenizer() -> Tokenizer:
    """One token for each word w0 .. w99, and a special token in front unless it is told not to."""
    vocab = {"<s>": 0, "?": 1} | {f"w{i}": i + 2 for i in range(100)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


TEXT = " ".join(f"w{i % 100}" for i in range(300))


@pytest.mark.parametrize(
    "data",
    [
        [{"input_ids": IDS}],
        {"input_ids": IDS},
        IDS,
        [IDS],
        iter([IDS]),
        [[IDS]],
        [BatchEncoding({"input_ids": IDS})],
        DataLoader(TensorDataset(IDS), batch_size=3),
    ],
    ids=lambda data: type(data).__name__,
)
def test_one_batch_of_ids_in_many_forms(data: object) -> None:
    (batch,) = batches(data)
    assert type(batch) is dict and list(batch) == ["input_ids"] and batch["input_ids"].equal(IDS)


def test_a_row_of_ids_becomes_a_batch() -> None:
    assert [batch["input_ids"].shape for batch in batches(list(IDS))] == [(1, 4)] * 3


def test_dicts_are_taken_as_they_are() -> None:
    given = {"x": torch.randn(2, 3), "mask": torch.ones(2, dtype=torch.bool)}
    assert batches([given, given]) == [given, given]


def test_no_more_is_read_than_asked_for() -> None:
    def endless():
        yield IDS
        yield IDS
        raise AssertionError("a third batch was asked for")

    assert len(batches(endless(), max_batches=2)) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batches"),
        (3, "of type int; pass an iterable"),
        ("some text", "use text_batches"),
        ([IDS, "text"], "batch 1 is of type str"),
        ([IDS, [1, 2]], "batch 1 is of type list"),
        ([torch.randn(2, 3)], "batch 0 is a tensor torch.float32 .* pass a dict"),
        ([torch.zeros(1, 2, 3, dtype=torch.int64)], "without a name"),
        ([{}], "batch 0 has no tensors"),
        ([{"input_ids": [[1, 2]]}], "batch 0: 'input_ids' is of type list"),
        ([{0: IDS}], "batch 0: 0 is of type Tensor"),
        ([IDS, IDS[:0]], r"batch 1: 'input_ids' is empty, \[0, 4\]"),
        ([{"x": torch.ones(2)}, {"x": torch.tensor([1, NAN, NAN])}], "batch 1: 2 of 3 .* 'x'"),
        ([{"x": torch.tensor([float("inf")])}], "1 of 1 values of 'x' are NaN or infinite"),
    ],
)
def test_what_calibration_cannot_use_is_named(data: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        batches(data)


def test_max_batches_is_checked() -> None:
    with pytest.raises(CalibrationError, match="max_batches is 0"):
        batches([IDS], max_batches=0)


@pytest.mark.parametrize("wrap", [False, True], ids=["tokenizers", "transformers"])
def test_windows_are_of_the_text(wrap: bool, capfd: pytest.CaptureFixture) -> None:
    tokenizer = make_tokenizer()
    if wrap:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8)
    assert token_ids(TEXT, tokenizer).tolist() == [i % 100 + 2 for i in range(300)]
    found = text_batches(TEXT, tokenizer, sequence=16, samples=10, batch_size=4)
    assert [batch["input_ids"].shape for batch in found] == [(4, 16), (4, 16), (2, 16)]
    windows = torch.cat([batch["input_ids"] for batch in found]) - 2
    assert (windows.diff() % 100 == 1).all()
    assert len(windows[:, 0].unique()) > 5
    with torch.device("meta"):
        again = text_batches(TEXT, tokenizer, sequence=16, samples=10, batch_size=10)
    assert again[0]["input_ids"].equal(windows + 2)
    other = text_batches(TEXT, tokenizer, sequence=16, samples=10, batch_size=10, seed=1)
    assert not other[0]["input_ids"].equal(windows + 2)
    assert capfd.readouterr() == ("", "")  # no warning that the text is long


def test_there_are_only_so_many_windows() -> None:
    (batch,) = text_batches("w0 w1 w2 w3", make_tokenizer(), sequence=3, batch_size=9)
    assert sorted(batch["input_ids"].tolist()) == [[2, 3, 4], [3, 4, 5]]


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert read_text(path) == read_text(str(path)) == read_text(TEXT) == TEXT
    assert read_text("no such file") == "no such file" and read_text("a\0b") == "a\0b"
    assert read_text("long " * 2000) == "long " * 2000
    for broken in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(CalibrationError, match="cannot read"):
            read_text(broken)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match="UTF-8"):
        read_text(path)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"'w1 w2' as text has 2 tokens and a window 512"):
        text_batches("w1 w2", make_tokenizer())
    with pytest.raises(CalibrationError, match="samples is 0"):
        text_batches(TEXT, make_tokenizer(), samples=0)


def test_a_tokenizer_that_only_encodes() -> None:
    encode = SimpleNamespace(encode=lambda text, add_special_tokens: SimpleNamespace(ids=[5]))
    assert token_ids("any", encode).tolist() == [5]
