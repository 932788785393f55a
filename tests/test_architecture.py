"""Size, words and surface of the package: what STYLE.md asks of every file."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest

import swan_surgery as swan


ROOT = Path(swan.__file__).parent
COMMAND_LINE = ROOT.with_name("swan_surgery_cli")
FILES = sorted([*ROOT.rglob("*.py"), *COMMAND_LINE.rglob("*.py")])
TESTS = sorted(Path(__file__).parent.glob("*.py"))
BENCHMARKS = sorted((ROOT.parent / "benchmarks").glob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def in_cli(file: Path) -> bool:
    return file.is_relative_to(COMMAND_LINE)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def offences(files: Iterable[Path], found_in: Callable[[Path], Iterable[object]]) -> list[str]:
    """What a rule finds wrong, file by file: all of it at once."""
    return [
        f"{file.relative_to(ROOT.parent)}: {found}" for file in files for found in found_in(file)
    ]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.parent,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_at_most_300_lines() -> None:
    def too_many(file: Path) -> list[int]:
        count = len(file.read_text(encoding="utf-8").splitlines())
        return [count] if count > 300 else []

    assert not offences(FILES, too_many)


def test_every_file_says_its_job() -> None:
    def missing(file: Path) -> list[str]:
        if file in TESTS and not file.read_text(encoding="utf-8"):
            return []  # tests/__init__.py
        first = (ast.get_docstring(tree_of(file)) or "no docstring").splitlines()[0]
        return [] if first.endswith((".", "?", ":")) else [first]

    assert not offences([*FILES, *TESTS, *BENCHMARKS], missing)


def test_ascii_only() -> None:
    assert not [file for file in FILES if not file.read_text(encoding="utf-8").isascii()]


def said_elsewhere(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """A setter by its getter, one of several signatures by what they are of."""
    names = [ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list]
    return "setter" in names or "overload" in names


def test_public_functions_and_classes_have_docstrings() -> None:
    def missing(file: Path) -> list[str]:
        names = []
        for node in ast.walk(tree_of(file)):
            own: list[ast.ClassDef | ast.FunctionDef] = []
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                own = [node, *(n for n in node.body if isinstance(n, ast.FunctionDef))]
            elif isinstance(node, ast.Module):
                own = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            own = [n for n in own if not said_elsewhere(n)]
            names += [n.name for n in own if n.name[0] != "_" and not ast.get_docstring(n)]
        return names

    assert not offences(FILES, missing)


# The issues spell these with three: calibrate(gated, loader, num_batches), report(before, after, example_inputs),
# export(model, path, example_inputs), compensate(small, reference, batches), optimizer_after(optimizer, gated,
# small), and swap_activations so, too.
_THREE = ("calibrate", "report", "export", "compensate", "swap_activations", "optimizer_after")


def test_at_most_two_positional_arguments_at_the_surface() -> None:
    def too_many(file: Path) -> list[str]:
        found = []
        for node in tree_of(file).body:
            if isinstance(node, ast.FunctionDef) and node.name in swan.__all__:
                positional = [*node.args.posonlyargs, *node.args.args]
                if len(positional) > 2 + (node.name in _THREE):
                    found.append(node.name)
        return found

    assert not offences(FILES, too_many)


def test_library_code_is_silent_and_pickles_nothing() -> None:
    def banned(file: Path) -> list[str]:
        found: list[str] = []
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import):
                found += [a.name for a in node.names if a.name.split(".")[0] in ("pickle", "dill")]
            elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib"):
                found.append(node.module)
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "torch.save", "torch.load", "eval", "exec"):
                    found.append(called)
        return found

    assert not offences([file for file in FILES if not in_cli(file)], banned)


def test_imports_are_absolute_at_the_top_and_not_starred() -> None:
    def elsewhere(file: Path) -> list[str]:
        tree = tree_of(file)
        top = {id(node) for node in tree.body}
        for block in tree.body:  # `with warnings.catch_warnings():` around an import
            if isinstance(block, ast.With):
                top |= {id(node) for node in block.body}
        found = []
        for node in ast.walk(tree):
            is_odd = isinstance(node, ast.ImportFrom) and (
                node.level != 0 or any(alias.name == "*" for alias in node.names)
            )
            if isinstance(node, (ast.Import, ast.ImportFrom)) and (is_odd or id(node) not in top):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        return found

    assert not offences(FILES, elsewhere)


def test_all_is_sorted_complete_and_importable() -> None:
    def wrong(file: Path) -> list[str]:
        module = importlib.import_module(module_name(file))
        names = getattr(module, "__all__", None)
        if names is None:
            bare = len(tree_of(file).body) == 1  # only a docstring
            needs_one = file.name == "__init__.py" and not bare
            return ["no __all__"] if needs_one else []
        # ruff's order: constants, classes, functions, each sorted.
        kinds = [0 if n.isupper() else 1 if n[0].isupper() else 2 for n in names]
        keys = list(zip(kinds, names, strict=True))
        found = [] if keys == sorted(set(keys)) else ["not sorted, or twice"]
        return found + [n for n in names if getattr(module, n, None) is None]

    assert not offences([file for file in FILES if file.name != "__main__.py"], wrong)


def test_the_rules_above_find_what_they_look_for() -> None:
    """A rule over all files must not pass because it reads none of them."""
    assert len(FILES) > 100
    assert len(TESTS) > 70
    assert len(BENCHMARKS) > 5
    file = ROOT / "never.py"
    assert offences([file], lambda own: [own.name]) == ["swan_surgery/never.py: never.py"]


def test_the_public_surface() -> None:
    imported = {
        alias.asname or alias.name
        for node in tree_of(ROOT / "__init__.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(swan.__all__)
    wanted = (
        "swanify unswanify prune calibrate report Report Objective CosineRamp parameter_groups "
        "soft_gates count_macs count_params expected_macs hard_macs marginal_macs GatedModel "
        "ChannelMap channel_map PruningPlan SwanError"
    )
    assert set(wanted.split()) <= set(swan.__all__)


def test_every_public_object_is_documented() -> None:
    found = []
    for name in swan.__all__:
        thing = getattr(swan, name)
        doc = inspect.getdoc(thing) or "none"
        if len(doc.splitlines()[0]) <= 20:
            found.append(f"{name}: {doc.splitlines()[0]}")
        if inspect.isfunction(thing) and "Error(" not in doc:
            parameters = [p for p in inspect.signature(thing).parameters if p != "self"]
            if len(parameters) > 1 and "Args:" not in doc:
                found.append(f"{name}: no Args:")
    assert not found


@pytest.mark.slow
def test_importing_is_silent_and_lean_starts_no_cuda_and_no_framework() -> None:
    # fvcore and torchvision meet a deprecation of torch at import; nothing else may warn.
    out = run_python(
        "import warnings\n"
        "warnings.filterwarnings('ignore', '.torch.jit.script. is deprecated', FutureWarning)\n"
        "import torch, os, sys\n"
        "before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "environment = dict(os.environ)\n"
        "import swan_surgery, swan_surgery.integrations\n"
        "assert not torch.cuda.is_initialized()\n"
        "after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
        "assert dict(os.environ) == environment\n"
        "assert torch.is_grad_enabled()\n"
        "heavy = ('sklearn', 'matplotlib', 'pandas', 'torch_pruning', 'hypothesis', 'pytest', 'typer',\n"
        "    'torchvision', 'lightning', 'transformers', 'accelerate', 'scipy', 'onnx', 'onnxruntime',\n"
        "    'onnxscript', 'yaml', 'tomli_w', 'PIL', 'swan_surgery_cli')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    assert out == "[]"


def test_every_room_has_a_test() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    text = "".join(file.read_text(encoding="utf-8") for file in TESTS)
    known = set(re.findall(r"swan_surgery(?:\.| import )(\w+)", text))
    known |= {file.stem.removeprefix("test_") for file in TESTS}  # by public names alone
    assert not rooms - known - {"__init__", "__pycache__"}
