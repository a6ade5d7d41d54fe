"""A folder that appears whole or not at all, and the checks that it is still whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ._manifest import MANIFEST, FileEntry, Manifest, one_line, read_manifest
from .core.errors import PackageError

EXPORTED = "qfx_quant.json"
"""What stands in the folders for other runtimes in the manifest's place. Its key `files` lists the other files."""

_LOCK = threading.Lock()
"""Names of temporaries tell processes apart, this tells threads apart."""


@contextlib.contextmanager
def staged(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which takes its place when the block ends without an error.

    Whatever happens, and whenever, `folder` is what it was before, or what the block made, or absent in the moment
    between two renames; the next save restores it then. On an error nothing of the block's work is left.

    Raises:
        PackageError: the target holds something else than a saved model, or must not be overwritten.
    """
    target = Path(os.path.realpath(folder))
    with _LOCK:
        _sweep(target)
        _check_target(target, overwrite)
        made = [p for p in [target.parent, *target.parent.parents] if not p.exists()]
        mine = target.parent / f".{target.name}.tmp-{os.getpid()}"
        try:
            mine.mkdir(parents=True)
            yield mine
            _sync(mine)
            _swap(mine, target)
        except BaseException:
            _remove(mine)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise PackageError("exists and is not a folder; choose another path")
    if not any(target.iterdir()):
        return
    kind = next((name for name in (MANIFEST, EXPORTED) if (target / name).is_file()), None)
    if kind is None:
        raise PackageError("exists and is not a qfx folder; choose another path, or empty it")
    if not overwrite:
        raise PackageError("exists; choose another path, or overwrite=True")
    try:
        known = read_manifest(target).files if kind == MANIFEST else exported_files(target)
    except PackageError as e:
        raise PackageError(f"exists, but {e}; to replace it, delete it first") from None
    held = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_symlink() or not p.is_dir()}
    if strange := sorted(held - {kind, *known}):  # a README, or the .git of a clone, would be lost
        names = ", ".join(strange[:3]) + (" ..." if len(strange) > 3 else "")
        raise PackageError(f"exists and has files that qfx did not write ({names}); move them, or choose another path")


def _swap(mine: Path, target: Path) -> None:
    """Puts a folder in the target's place; no call renames over a folder that is not empty."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if not target.exists():
        os.rename(mine, target)
    else:
        os.rename(target, old)
        try:
            os.rename(mine, target)
        except BaseException:
            os.rename(old, target)
            raise
    _sync_one(target.parent)
    _remove(old)


def _sweep(target: Path) -> None:
    """Removes what dead processes left beside the target; restores the target if one died between its two renames."""
    for kind in ("old", "tmp"):
        for path in _siblings(target, kind):
            pid = path.name.rpartition("-")[2]
            if not pid.isdigit() or _alive(int(pid)):
                continue
            if kind == "old" and not target.exists() and _has_manifest(path):
                os.rename(path, target)
            else:
                _remove(path)


def _siblings(target: Path, kind: str) -> list[Path]:
    parent = target.absolute().parent
    return [p for p in parent.iterdir() if p.name.startswith(f".{target.name}.{kind}-")] if parent.is_dir() else []


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # in a container the dead process may well have had our number
        return False
    if os.name == "nt":  # where the question would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _remove(folder: Path) -> None:
    """Deletes a folder; its manifest goes first, so that what a kill leaves is never taken for a whole one."""
    for name in (MANIFEST, EXPORTED):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # some systems cannot sync a folder
            raise


def exported_files(folder: Path) -> dict[str, FileEntry]:
    """The other files of a folder for another runtime, as `EXPORTED` lists them; PackageError if it does not."""
    try:
        data = json.loads((folder / EXPORTED).read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, FileEntry]).validate_python(data["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as e:
        raise PackageError(f"{EXPORTED} cannot be read ({one_line(e)})") from None


def _has_manifest(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, EXPORTED))


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file but the manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    named = {p.relative_to(folder).as_posix(): p for p in files}
    return {
        n: FileEntry(size=p.stat().st_size, sha256=_hash(p)) for n, p in named.items() if n not in (MANIFEST, EXPORTED)
    }


def open_folder(folder: Path, verify: bool) -> Manifest:
    """The manifest of a folder that is whole.

    Raises:
        PackageError: it is no folder of qfx, or a file is missing, has another size, or (if `verify`) other contents
            than it was saved with.
    """
    if not folder.is_dir():
        backups = [p.name for p in _siblings(folder, "old") if (p / MANIFEST).is_file()]
        why = f"a save was interrupted, rename {backups[0]} to it or save again" if backups else "check the path"
        raise PackageError(f"no such folder; {why}")
    manifest = read_manifest(folder)
    check_files(folder, manifest.files, verify)
    return manifest


def check_files(folder: Path, files: Mapping[str, FileEntry], verify: bool) -> None:
    """Raises PackageError unless files have the sizes, and if `verify` the hashes, that they were saved with."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise PackageError(f"{name} is missing; copy or save the folder again")
        size = path.stat().st_size
        if size < entry.size:
            raise PackageError(f"{name} is truncated, {size:,} of {entry.size:,} bytes; copy or save the folder again")
        if size > entry.size:
            raise PackageError(f"{name} has {size:,} bytes instead of {entry.size:,}; copy or save the folder again")
    for name, entry in files.items() if verify else ():
        if _hash(folder / name) != entry.sha256:
            raise PackageError(f"{name} is not what was saved, its hash differs; copy or save the folder again")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
