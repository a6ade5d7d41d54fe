"""Rules one would otherwise have to remember: who imports whom, what code may not say."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGE_OF = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}
# modules of qfx
IMPORT_PASSES = {
    "inputs",
    "verify",
    "quantize",
    "lowering",
    "recipes",
    "package",
    "cli",
    "backend",
    "watched",
    "_handover",
    "solution",
    "calibrated",
    "explain",
}
MAX_LINES = 400
HOOKS = re.compile(r"register_(module_)?forward_(pre_)?hook")
FAMILIES = (
    "llama mistral mixtral bert roberta qwen gemma falcon bloom deepseek olmo granite persimmon "
    "whisper starcoder stablelm internlm baichuan chatglm"
)
ARCHITECTURE = re.compile(rf"({'|'.join(FAMILIES.split())})[a-z]*|opt|gpt|phi|mpt|glm")  # whole words


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def installed_name(path: str) -> str:
    """passes/solve/gptq.py -> qfx.passes.solve.gptq"""
    folder, *rest = Path(path).with_suffix("").parts
    return ".".join([PACKAGE_OF[folder], *rest]).removesuffix(".__init__")


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(tree: ast.AST, path: str) -> set[str]:
    """Full names of all that a file imports: `from ..core import spec` -> qfx.core.spec"""
    package = installed_name(str(Path(path).parent / "__init__"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


class _AtImport(ast.NodeTransformer):
    """Leaves what runs when a module is imported."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None


def needs_triton(source: str, path: str) -> list[str]:
    """What a file imports, when it is imported, that is there with Triton only."""
    if within(installed_name(path), "qfx.kernels.gpu"):
        return []
    return [n for n in imports(_AtImport().visit(ast.parse(source)), path) if within(n, "triton", "qfx.kernels.gpu")]


def words(tree: ast.AST) -> set[str]:
    """Every identifier and string of the code, without docstrings and comments."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = (node for node in ast.walk(tree) if id(node) not in prose)
    return {text for node in nodes for _, text in ast.iter_fields(node) if isinstance(text, str)}


def forbidden_import(module: str, name: str) -> str | None:
    if not within(name, "qfx"):
        return None
    if within(module, "qfx.core") and not within(name, "qfx.core"):
        return "qfx.core is the floor: it imports nothing else of qfx"
    if within(module, "qfx.modules") and not within(name, "qfx.core", "qfx.kernels", "qfx.modules"):
        return "modules import nothing of qfx but qfx.core and qfx.kernels"
    if within(module, "qfx.kernels") and not within(name, "qfx.core", "qfx.kernels"):
        return "kernels import nothing of qfx but qfx.core"
    if within(module, "qfx.export") and within(name, "qfx.passes", "qfx.kernels"):
        return "export reads the reference graph, and imports no passes and no kernels"
    if not within(name, "qfx.passes") or module == "qfx.passes":
        return None  # passes/__init__.py is the table of all methods
    if within(module, "qfx.passes"):
        phase = ".".join(module.split(".")[:3])
        own_helper = within(name, phase) and name.removeprefix(phase).startswith("._")
        is_index = module == phase and within(name, phase)  # the phase's own __init__.py
        return None if own_helper or is_index else "a pass imports no pass of another file"
    if module.removeprefix("qfx.") not in IMPORT_PASSES:
        return f"of qfx only {sorted(IMPORT_PASSES)} import passes"
    return None


def violations(path: str, source: str) -> list[str]:
    tree, module = ast.parse(source), installed_name(path)
    found = [f"imports {n}: {why}" for n in imports(tree, path) if (why := forbidden_import(module, n))]
    found += [f"imports {n}: outside of functions, where Triton may be missing" for n in needs_triton(source, path)]
    said = words(tree) | {module}
    found += [f"uses {text}: no hooks as control flow" for text in said if HOOKS.search(text)]
    found += [f"uses {text}: private" for text in said if re.search(r"\b_inductor\b", text)]
    if within(module, "qfx.passes"):
        parts = {w for t in said for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", t)}
        named = (word for word in parts if ARCHITECTURE.fullmatch(word.lower()))
        found += [f"names an architecture: {word}" for word in named]
    return [f"{path}: {what}" for what in sorted(found)]


def test_the_sources_keep_the_rules() -> None:
    paths = [path.relative_to(ROOT).as_posix() for path in sources(*PACKAGE_OF)]
    found = [broken for path in paths for broken in violations(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {path.parent.relative_to(ROOT) / "__init__" for path in sources(*PACKAGE_OF)}
    assert {installed_name(str(folder)) for folder in folders} <= set(SETUPTOOLS["packages"])


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    paths = sources(*PACKAGE_OF, "tests", "benchmarks", "examples")
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert not {path: count for path, count in lines.items() if count > MAX_LINES}


BROKEN = [
    ("qfx/core/a.py", "from qfx.report import table", "floor"),
    ("qfx/core/a.py", "from qfx import passes", "floor"),
    ("kernels/a.py", "def f():\n    import qfx.export.onnx", "nothing of qfx but"),
    ("kernels/a.py", "from qfx.kernels.gpu.w4 import w4", "Triton may be missing"),
    ("kernels/a.py", "class A:\n    from qfx.kernels import gpu", "Triton may be missing"),
    ("qfx/core/a.py", "import triton.language as tl", "Triton may be missing"),
    ("export/a.py", "from qfx.kernels.w4a16_linear import pack", "no kernels"),
    ("export/a.py", "from qfx import passes", "no passes"),
    ("qfx/modules/a.py", "from qfx.passes import METHODS", "modules import"),
    ("passes/solve/gptq.py", "from qfx.passes.solve.rtn import Rtn", "another file"),
    ("passes/solve/gptq.py", "from qfx.passes.solve import rtn", "another file"),
    ("passes/solve/gptq.py", "from qfx.passes.transform._search import grid", "another file"),
    ("passes/solve/gptq.py", "from . import rtn", "another file"),
    ("qfx/core/a.py", "from ..report import table", "floor"),
    ("qfx/data.py", "from .passes.solve import gptq", "import passes"),
    ("qfx/data.py", "from qfx.passes import METHODS", "import passes"),
    ("passes/calibrate/a.py", "m.register_forward_pre_hook(f)", "hooks"),
    ("qfx/backend.py", "import torch._inductor.config", "private"),
    ("qfx/backend.py", "torch._inductor.config.debug = True", "private"),
    ("passes/discover/a.py", "if isinstance(m, LlamaAttention): pass", "architecture: Llama"),
    ("passes/discover/a.py", "kind = f'{x}.qwen2_moe.experts'", "architecture: qwen"),
    ("passes/discover/a.py", "TABLE = {'OPTForCausalLM': 1}", "architecture: OPT"),
    ("passes/transform/gpt2.py", "x = 1", "architecture: gpt"),
]
KEPT = [
    ("qfx/core/a.py", "import torch\nfrom qfx.core.spec import QSpec"),
    ("qfx/core/a.py", "from .grid import Int\nfrom ..core import spec"),
    ("kernels/a.py", "from qfx.core import spec\nfrom qfx.kernels._rows import rows"),
    ("kernels/a.py", "def f():\n    from qfx.kernels.gpu.w4 import w4\n    import triton"),
    ("kernels/gpu/a.py", "import triton\nfrom qfx.kernels.gpu.launch import Launcher"),
    ("export/a.py", "from qfx.core.graph import Graph"),
    ("passes/__init__.py", "from qfx.passes.solve.gptq import Gptq"),
    ("passes/solve/gptq.py", "from qfx.passes.solve._obs import inverse_hessian"),
    ("passes/lower/a.py", "from qfx.kernels import w4a16_linear"),
    (
        "passes/solve/gptq.py",
        '"""As OPTQ, for Llama and GPT-2."""\noption = optimizer = graphics = 1',
    ),
    ("qfx/recipes.py", "from qfx.passes import METHODS\nfamily = 'llama'"),
]


@pytest.mark.parametrize(("path", "source", "why"), BROKEN)
def test_a_broken_rule_is_found(path: str, source: str, why: str) -> None:
    assert why in "\n".join(violations(path, source))


@pytest.mark.parametrize(("path", "source"), KEPT)
def test_allowed_code_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
