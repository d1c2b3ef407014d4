"""The house rules, so that they hold without anyone watching."""

import ast
import dataclasses
import importlib
import re
import subprocess
from pathlib import Path
from typing import get_type_hints

import pytest

from autoregressive.models import generate
from autoregressive.models.conditions import CONDITIONS
from autoregressive.models.gpt import GPT_models
from autoregressive.models.guidance import GUIDANCE
from autoregressive.models.paradigms import PARADIGMS
from autoregressive.train.options import GPTOptions
from tests.conftest import export_models
from tokenizer.tokenizer_image.quantizer import QUANTIZERS
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.tokenizer_image.vq_options import TokenizerOptions
from utils.checkpoint import export, read_export

REPOSITORY = Path(__file__).resolve().parents[1]
ROOMS = ("tokenizer", "autoregressive", "evaluations", "utils", "scripts")
SOURCES = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").glob("*.py"))


def functions(tree: ast.AST):
    """Every function with the names of the functions and classes around it."""
    def walk(node, around):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child, around
                yield from walk(child, (*around, child))
            else:
                yield from walk(child, (*around, child) if isinstance(child, ast.ClassDef) else around)

    yield from walk(tree, ())


def relative(path: Path) -> str:
    """A path as messages show it."""
    return str(path.relative_to(REPOSITORY))


def test_top_level_is_llamagens():
    """A newcomer finds LlamaGen's rooms and nothing else."""
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked} == {
        "tokenizer", "autoregressive", "evaluations", "utils", "scripts", "tests", "requirements.txt", "README.md",
        "LICENSE", "pyproject.toml", ".gitignore", ".ci", ".github"}


def test_files_and_functions_stay_small():
    """A file over 400 lines (tests: 500), or a function over 50, is two."""
    for path in SOURCES + TESTS:
        text = path.read_text()
        assert len(text.splitlines()) <= (500 if path in TESTS else 400), relative(path)
        for function, _ in functions(ast.parse(text)):
            assert function.end_lineno - function.lineno + 1 <= 50, f"{relative(path)}: {function.name}"
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 130, f"{relative(path)}:{number}"


MAY_IMPORT = {"utils": {"utils"}, "tokenizer": {"tokenizer", "utils"}, "evaluations": {"evaluations", "utils"},
              "autoregressive": {"autoregressive", "tokenizer", "utils"}, "scripts": set(ROOMS)}


def imported_rooms(path: Path) -> set[str]:
    """The first parts of all names that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_imports_point_down_only():
    """A room that imports from above cannot be read, tested or used without it."""
    for path in SOURCES:
        room = relative(path).split("/")[0]
        upward = imported_rooms(path) & set(ROOMS) - MAY_IMPORT[room]
        assert not upward, f"{relative(path)} imports {upward}"


def test_everything_public_is_documented():
    """Modules, public classes and functions say what they are for; tests say why they matter."""
    for path in SOURCES + TESTS:
        tree = ast.parse(path.read_text())
        if path.name != "__init__.py":
            assert ast.get_docstring(tree), relative(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{relative(path)}: class {node.name}"
        for function, around in functions(tree):
            nested = any(isinstance(outer, ast.FunctionDef) for outer in around)
            helper = path in TESTS and not function.name.startswith("test_")
            if not function.name.startswith("_") and not nested and not helper:
                assert ast.get_docstring(function), f"{relative(path)}: {function.name}"


def test_print_is_command_line_output_only():
    """Libraries log; only an entry point's own output is printed."""
    for path in SOURCES:
        for node, around in functions(ast.parse(path.read_text())):
            inner = {id(n) for f, _ in functions(node) for n in ast.walk(f)}
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print" and id(call) not in inner:
                    names = [node.name, *(outer.name for outer in around)]
                    assert any(name == "main" or name.startswith("print_") for name in names), \
                        f"{relative(path)}:{call.lineno}"


def option_classes() -> list[type]:
    """Every dataclass that a command line is made of, and those inside them."""
    roots = []
    for path in SOURCES:
        for name in re.findall(r"parse\((\w+)", path.read_text()):
            module = importlib.import_module(relative(path)[:-3].replace("/", "."))
            if dataclasses.is_dataclass(getattr(module, name, None)):
                roots.append(getattr(module, name))
    assert len(roots) >= 8
    return roots


def flat_fields(config: type) -> list[tuple[type, str]]:
    """(declaring class, field) of all flags of one command line."""
    found: list[tuple[type, str]] = []
    for name, kind in get_type_hints(config).items():
        found += flat_fields(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else [(config, name)]
    return found


def test_no_flag_is_declared_twice_on_a_command_line():
    """Flags have no prefixes: two fields of one name would hide each other."""
    for config in option_classes():
        names = [name for _, name in flat_fields(config)]
        assert len(names) == len(set(names)), config.__name__


def test_every_flag_is_read_somewhere():
    """A flag that nothing reads is a promise nobody keeps."""
    code = "\n".join(path.read_text() for path in SOURCES)
    for config in option_classes():
        for owner, name in flat_fields(config):
            assert re.search(rf"\.{name}\b", code), f"{owner.__name__}.{name}"


def test_options_name_every_row_of_their_tables():
    """A row that is no choice of its option cannot be had, and --help must list it."""
    for owner, option, rows in ((generate.SamplingOptions, "guidance", GUIDANCE), (GPTOptions, "gpt_model", GPT_models),
                                (GPTOptions, "paradigm", ["auto", *PARADIGMS]), (GPTOptions, "condition", CONDITIONS),
                                (TokenizerOptions, "vq_model", VQ_models),
                                (TokenizerOptions, "quantizer", ["auto", *QUANTIZERS])):
        assert get_type_hints(owner, include_extras=True)[option].__metadata__[0].metavar == "{" + ",".join(rows) + "}"


def test_every_flag_is_explained():
    """--help is the first documentation that is read."""
    for config in option_classes():
        for owner, name in flat_fields(config):
            source = Path(importlib.import_module(owner.__module__).__file__).read_text()
            assert re.search(rf'^    {name}: .*\n    """', source, re.MULTILINE), f"{owner.__name__}.{name}"


def test_torch_load_never_unpickles_objects():
    """A weights file from the internet must not be able to run code."""
    for path in SOURCES:
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
            assert "weights_only=True" in call, f"{relative(path)}: {call}"


def test_the_readmes_examples_in_python_run(tmp_path, monkeypatch):
    """The first lines a user copies, as they stand: with all imports and all variables."""
    monkeypatch.chdir(tmp_path)
    gpt, _ = export_models(tmp_path / "released" / "iar2")
    description, tensors = read_export(gpt, "gpt", "--gpt-ckpt")
    preset = {"guidance": "attention", "cfg_scale": [1.5, 3.0], "cfg_attention_weight": 0.1}
    export(gpt, "gpt", tensors, description | {"sampling": preset, "class_names": ["tench", "goldfish", "great white shark"]})
    names: dict = {}
    for readme in ("README.md", "autoregressive/README.md"):
        block = re.search(r"```python\n(.*?)```", (REPOSITORY / readme).read_text(), re.DOTALL)
        assert block, readme
        exec(block.group(1), names)
    assert names["tench"].size == names["shark"].size == (32, 32) and names["tench"] != names["shark"]
    assert names["images"].shape == (2, 3, 32, 32)
    assert [tuple(part.shape) for part in names["logits"]] == [(2, 16, 8), (2, 16, 16)]
    assert generate.carried_sampling(names["gpt"]) == generate.SamplingOptions("attention", (1.5, 3.0), 0.1)
