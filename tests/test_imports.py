"""The rules of import: who may know whom, and what starts without torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = sorted((ROOT / "model").rglob("*.py"))
EVERY = [*MODEL, *sorted((ROOT / "dbrx_cli").rglob("*.py"))]
LIGHT = ["errors", "messages", "chat_template", "tokenizer", "detokenizer", "config", "checkpoint", "hub", "sampling"]


@cache
def imports(path: Path) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import of a file, anywhere in it, and whether only a type checker reads it."""
    found = []
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text("utf-8")), False)]
    while waiting:
        node, typing = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, typing))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += [(each, True) for each in node.body] + [(each, typing) for each in node.orelse]
        else:  # no expression holds a statement
            waiting += [(each, typing) for each in ast.iter_child_nodes(node) if not isinstance(each, ast.expr)]
    return found


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    for node, _ in imports(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def needed(path: Path, modules: frozenset[str]) -> set[str]:
    """Modules of this project that a file imports, inside functions too; not those that only a type checker reads."""
    package = path.relative_to(ROOT).parts[:-1]
    found: set[str] = set()
    for node, typing in imports(path):
        if typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {full if (full := f"{name}.{alias.name}") in modules else name for alias in node.names}
    return found & modules


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One of the graph's circles, or nothing: what is left when leaves are taken off until there is none."""
    left = {name: set(others) for name, others in graph.items()}
    while leaves := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in leaves}
    way = list(left)[:1]
    while way and way.count(way[-1]) < 2:
        way.append(min(left[way[-1]] & left.keys()))
    return way[way.index(way[-1]) :] if way else []


def test_no_modules_import_each_other() -> None:
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in EVERY}
    modules = frozenset(paths)
    assert circle({name: needed(path, modules) - {name} for name, path in paths.items()}) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c", "b"]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", MODEL, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_knows_no_terminal(path: Path) -> None:
    for name in imported(path):
        for banned in ("dbrx_cli", "typer", "click", "rich", "prompt_toolkit", "httpx", "httpx2", "tests"):
            assert not within(name, banned), name


@pytest.mark.parametrize("path", MODEL, ids=lambda p: str(p.relative_to(ROOT)))
def test_inside_the_library_imports_are_relative(path: Path) -> None:
    for node, _ in imports(path):
        if isinstance(node, ast.Import):
            assert not any(within(alias.name, "model") for alias in node.names)
        elif node.level == 0:
            assert not within(node.module or "", "model")


def test_the_decode_loop_sees_no_text() -> None:
    for file in ("prefill", "sequence", "scheduler", "kv_pool", "session"):
        for name in imported(ROOT / "model" / f"{file}.py"):
            assert not any(
                within(name, f"model.{m}") for m in ("tokenizer", "detokenizer", "chat_template", "messages")
            )


@pytest.mark.parametrize("folder", ["attention", "experts", "kernels", "quantization"])
def test_choices_do_not_know_who_chooses(folder: str) -> None:
    for path in (ROOT / "model" / folder).glob("*.py"):
        assert not any(within(name, "model.loading") for name in imported(path))


def test_nobody_imports_click() -> None:
    for path in (ROOT / "dbrx_cli").rglob("*.py"):
        assert not any(within(name, "click") for name in imported(path))


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running some code in a fresh process."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", LIGHT)
def test_imports_without_torch(module: str) -> None:
    assert not {"torch", "accelerate", "huggingface_hub"} & loaded_by(f"import model.{module}")


def test_help_starts_without_torch() -> None:
    code = "from dbrx_cli.app import app\ntry: app(['generate', '--help'])\nexcept SystemExit: pass"
    assert not {"torch", "accelerate", "huggingface_hub", "prompt_toolkit", "tiktoken"} & loaded_by(code)


@pytest.mark.slow
def test_a_network_on_the_meta_device_starts_without_pytorchs_compiler() -> None:
    code = "import torch, model\nwith torch.device('meta'): model.DbrxForCausalLM(model.DbrxConfig(n_layers=1))"
    assert "sympy" not in loaded_by(code), "torch._dynamo was imported, which takes a second"


def test_a_stray_model_in_the_users_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); from dbrx_cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "start dbrx from another folder" in line


def test_annotations_of_flags_are_no_text() -> None:
    """typer reads them all at each start: as text, Python would compile each anew (4 % of `dbrx --version`)."""
    cli = ROOT / "dbrx_cli"
    for path in (cli / "options.py", cli / "server" / "options.py", *(cli / "commands").glob("*.py")):
        assert "from __future__ import annotations" not in path.read_text("utf-8"), path
