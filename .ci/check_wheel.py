"""Check that a wheel holds every module and asset of the repository, and nothing outside qfx/."""

import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def expected() -> set[str]:
    """Names in the wheel of all sources under the mapped folders, listed as packages or not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = set()
    for package, folder in settings["package-dir"].items():
        for path in (ROOT / folder).rglob("*"):
            is_data = (folder == "qfx" and "assets" in path.parts) or path.parent.name == "tables"
            if path.is_file() and path.suffix != ".pyc" and (path.suffix == ".py" or is_data):
                inside = path.relative_to(ROOT / folder).as_posix()
                names.add(f"{package.replace('.', '/')}/{inside}")
    return names


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.endswith("/")}
    wanted = expected()
    problems = [f"missing: {name}" for name in sorted(wanted - found)]
    problems += [f"unexpected: {name}" for name in sorted(found - wanted) if ".dist-info/" not in name]
    if problems:
        sys.exit(f"{wheel}: check `packages` in pyproject.toml\n  " + "\n  ".join(problems))
    print(f"{wheel}: {len(wanted)} files, none missing")


if __name__ == "__main__":
    main(*sys.argv[1:])
