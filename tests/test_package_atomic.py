"""Whatever interrupts a save, the target is what it was or what it becomes, and the next save clears up."""

import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import qfx
from qfx import _shards
from qfx.core.errors import PackageError
from tests.plain import Plain

EVENTS = {"open", "os.mkdir", "os.rename", "os.scandir", "os.listdir"}
"""What touches the file system, as Python's audit hooks name it; deletions, too, which may name no folder."""


def save(folder: Path, value: float) -> None:
    qfx.save(Plain(value), folder, max_shard_size="20KB")


def value_of(folder: Path) -> float:
    """Of what is saved, all of it; hashes are compared, too."""
    values = {v for p in qfx.load(folder, Plain()).parameters() for v in p.unique().tolist()}
    assert len(values) == 1
    return values.pop()


def forked(work: Callable[[], Any]) -> int:
    """The signal that ended a process which did the work; 0 if it came to the end."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status)


def save_until(event: int, folder: Path, value: float) -> None:
    """Dies on the way to the file system, before the operation."""
    left = event

    def count(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if name in ("os.remove", "os.rmdir") or (name in EVENTS and str(folder.parent) in str(args)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    model = Plain(value)
    sys.addaudithook(count)
    qfx.save(model, folder, max_shard_size="20KB")


def points(folder: Path) -> Iterator[int]:
    """Kills a save of 2 at each of its operations in turn, until one comes through."""
    event = 0
    while forked(partial(save_until, event, folder, 2.0)):
        yield event
        event += 1
    assert event > 20 and value_of(folder) == 2.0


def test_killed_at_any_operation_a_save_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    seen: list[float | str] = []
    save(folder, 1.0)
    for _ in points(folder):
        for old in tmp_path.glob(".saved.old-*/qfx.json"):
            assert value_of(old.parent) == 1.0
        if folder.exists():
            seen.append(value_of(folder))
        else:
            with pytest.raises(
                PackageError, match=r"no such folder; a save was interrupted, rename \.saved\.old-\d+ to"
            ):
                qfx.load(folder)
            seen.append("away")
            with pytest.raises(PackageError, match="no files of a tokenizer"):
                qfx.save(Plain(), folder, tokenizer=tmp_path)
            assert value_of(folder) == 1.0  # also a save that fails brings it back
        save(folder, 1.0)
        assert [p.name for p in tmp_path.iterdir()] == ["saved"] and value_of(folder) == 1.0
    assert seen == sorted(seen, key=[1.0, "away", 2.0].index) and set(seen) == {1.0, "away", 2.0}


def test_killed_at_any_operation_a_first_save_leaves_nothing_or_all(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    for _ in points(folder):
        assert not folder.exists() or value_of(folder) == 2.0
        shutil.rmtree(folder, ignore_errors=True)
        save(tmp_path / "saved", 1.0)
        assert [p.name for p in tmp_path.iterdir()] == ["saved"]
        shutil.rmtree(folder)


def test_killed_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write = tmp_path / "saved", _shards.save_file
    save(folder, 1.0)

    def half(tensors: Any, path: Path, **kwargs: Any) -> None:
        write(tensors, path, **kwargs)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(_shards, "save_file", half)
    assert forked(lambda: save(folder, 2.0)) == signal.SIGKILL
    assert value_of(folder) == 1.0 and len(list(tmp_path.iterdir())) == 2


def test_killed_at_any_time(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(folder, 0.0)

    def work() -> None:
        for i in range(1000):
            save(folder, float(i))

    for i in range(12):
        if (pid := os.fork()) == 0:
            work()
            os._exit(1)
        time.sleep(0.03 + 0.007 * i)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if folder.exists():
            assert value_of(folder) >= 0.0
    save(folder, 5.0)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"] and value_of(folder) == 5.0


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(folder, 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in (folder, tmp_path / "new" / "inner" / "saved"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
        try:
            with pytest.raises(PackageError, match=r"^save: \S+: .*[Ff]ile too large.*; what was there is as it was$"):
                save(target, 2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"] and value_of(folder) == 1.0


def test_a_target_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PackageError, match=r"save: \S+/file/x: Not a directory; what was there is as it was"):
        save(tmp_path / "file" / "x", 1.0)
    with pytest.raises(PackageError, match=r"exists and is not a folder; choose another path"):
        save(tmp_path / "file", 1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_shards, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "x", 1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_what_qfx_wrote_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    save(folder, 1.0)  # an empty one
    save(folder, 2.0)
    assert value_of(folder) == 2.0
    with pytest.raises(PackageError, match=r"saved: exists; choose another path, or overwrite=True"):
        qfx.save(Plain(), folder, overwrite=False)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "README.md").write_text("mine")
    with pytest.raises(PackageError, match=r"files that qfx did not write \(\.git/HEAD, README\.md\); move them"):
        save(folder, 3.0)
    assert value_of(folder) == 2.0 and (folder / "README.md").read_text() == "mine"
    shutil.rmtree(folder / ".git")
    (folder / "README.md").unlink()
    (folder / "qfx.json").write_text("{")
    with pytest.raises(PackageError, match=r"exists, but qfx\.json is not JSON .*; to replace it, delete it first"):
        save(folder, 3.0)
    (folder / "qfx.json").unlink()
    with pytest.raises(PackageError, match=r"exists and is not a qfx folder; choose another path, or empty it"):
        save(folder, 3.0)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_link_keeps_pointing_to_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "real", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink() and value_of(tmp_path / "real") == 2.0


def test_temporaries_of_the_living_and_of_others_stay(tmp_path: Path) -> None:
    stay = [f".saved.tmp-{os.getppid()}", ".saved.tmp-x", ".saved2.tmp-1", "saved.tmp-1", ".saved.old-1"]
    for name in (*stay, f".saved.tmp-{os.getpid()}", f".saved.old-{os.getpid()}"):
        (tmp_path / name).mkdir()
    save(tmp_path / "saved", 1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*stay, "saved"])


def test_threads_that_save_to_one_place_take_turns(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(value: float) -> None:
        try:
            for _ in range(5):
                save(tmp_path / "saved", value)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and value_of(tmp_path / "saved") in range(4)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"] and torch.get_default_dtype() == torch.float32
