"""The documentation says what is so: generated pages, links, quoted commands, figures, the tree."""

from __future__ import annotations

import html
import re
import shlex
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.exceptions import TyperException

from dbrx_cli.app import app
from dbrx_cli.repl.loop import WELCOME
from tests import fidelity, make_api_docs, make_cli_docs
from tests.cli import commands_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / ".github").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
ASSIGNMENT = re.compile(r"\w+=.*")
BETWEEN = {"|", "||", "&&", ";", "(", ")", "&"}
REDIRECTION = re.compile(r"[<>]+&?")


def test_the_command_lines_page_is_what_the_program_says() -> None:
    assert make_cli_docs.PAGE.read_text("utf-8") == make_cli_docs.page(), "run `make docs`"


def test_the_librarys_page_is_what_its_docstrings_say() -> None:
    assert make_api_docs.PAGE.read_text("utf-8") == make_api_docs.page(), "run `make docs`"


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", path.read_text("utf-8"))


def anchors(path: Path) -> set[str]:
    """What headings of a page can be linked to, as GitHub makes them."""
    headings = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose(path))]
    return {heading.replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_resolve(path: Path) -> None:
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def sections(path: Path) -> dict[str, str]:
    """The text under each heading of the second level, by its anchor; "" is what stands before the first."""
    parts = re.split(r"^## (.+)\n", path.read_text("utf-8"), flags=re.MULTILINE)
    anchored = (heading.lower().replace(" ", "-") for heading in parts[1::2])
    return {"": parts[0], **dict(zip(anchored, parts[2::2], strict=True))}


def test_the_arabic_page_follows_the_english_one() -> None:
    """Its sections name what they translate, and the checksum that it had; what is newer is named with its new one."""
    page = (DOCS / "ar" / "README.md").read_text("utf-8")
    english = {name: sha256(text.encode()).hexdigest()[:8] for name, text in sections(ROOT / "README.md").items()}
    translated = dict(re.findall(r"^<!-- README\.md#([\w-]*) (\w+) -->$", page, re.MULTILINE))
    assert translated, "docs/ar/README.md does not say what it translates"
    newer = {name: english.get(name) for name, of in translated.items() if english.get(name) != of}
    assert not newer, "these sections of README.md are newer: translate them, then write their checksums into docs/ar"


def test_every_page_can_be_reached() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        links = (link.partition("#")[0] for link in LINK.findall(prose(page)))
        waiting += [(page.parent / link).resolve() for link in links if link.endswith(".md") and "://" not in link]
    assert {path for path in PAGES if DOCS in path.parents} <= reached


def quoted(text: str) -> Iterator[list[str]]:
    """The arguments of each `dbrx` command in the shell blocks of a page."""
    for kind, block in BLOCK.findall(text):
        if kind not in ("console", "sh", "bash", "shell"):
            continue
        lines = block.replace("\\\n", " ").splitlines()
        if kind == "console":  # what follows a prompt is typed, the rest is the answer
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            yield from dbrx_commands(list(lexer))


def dbrx_commands(words: list[str]) -> Iterator[list[str]]:
    """The arguments of `dbrx` in a line of the shell: behind variables, in a pipe, without its redirections."""
    part: list[str] = []
    for word in [*words, ";"]:
        if word not in BETWEEN:
            part.append(word)
            continue
        while part and ASSIGNMENT.fullmatch(part[0]):
            part.pop(0)
        if part[1:3] == ["-m", "dbrx_cli"]:
            part = ["dbrx", *part[3:]]
        if part and part[0].rpartition("/")[2] == "dbrx":
            end = next((i for i, word in enumerate(part) if REDIRECTION.fullmatch(word)), len(part))
            yield part[1:end]
        part = []


def parse(args: list[str]) -> None:
    """Have Typer read a command line as the program would, without running it."""
    command: Any = commands_of(app)
    context, name, rest = typer.Context(command), "dbrx", list(args)
    try:
        while rest and not rest[0].startswith("-") and hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, rest)
            context = typer.Context(command, parent=context, info_name=name)
        if args:
            command.make_context(name, rest, parent=context.parent)
    except typer.Exit:  # --help or --version did its work
        pass


@each_page
def test_quoted_commands_parse(path: Path) -> None:
    for args in quoted(path.read_text("utf-8")):
        try:
            parse(args)
        except TyperException as error:
            pytest.fail(f"dbrx {shlex.join(args)}: {error.format_message()}")


def test_the_test_of_commands_tests() -> None:
    page = (
        "```sh\nA=1 .venv/bin/dbrx chat -m demo < script.txt  # to\ncat x | python -m dbrx_cli generate 'a | b' \\\n"
        "  --json > out\n```\n```console\n$ dbrx --version\ndbrx 1.0\n```\n```python\ndbrx = 1\n```\n"
    )
    assert list(quoted(page)) == [["chat", "-m", "demo"], ["generate", "a | b", "--json"], ["--version"]]
    for args in (
        ["chat", "--no-such-flag"],
        ["no-such-command"],
        ["generate", "--attn", "none"],
        ["download"],
        ["models", "x"],
    ):
        with pytest.raises(TyperException):
            parse(args)


def test_the_fidelity_page_has_every_model_and_backend() -> None:
    page = (DOCS / "fidelity.md").read_text("utf-8")
    assert page.count(fidelity.BEGIN) == page.count(fidelity.END) == 1
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert {f"{name}, {backend}" for name in fidelity.GOLDEN for backend in fidelity.BACKENDS} <= rows
    assert set(fidelity.GOLDEN) <= rows


def test_the_architecture_page_names_every_module() -> None:
    page = (DOCS / "architecture.md").read_text("utf-8")
    for package in ("model", "dbrx_cli"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):
                assert re.search(rf"\b{re.escape(path.name)}\b", page), path.relative_to(ROOT)
    for name in re.findall(r"^ *(\w+\.py) ", page, re.MULTILINE):
        assert any(ROOT.glob(f"model/**/{name}")) or any(ROOT.glob(f"dbrx_cli/**/{name}")), name


def test_security_names_tests_that_exist() -> None:
    """Each function is named behind its file."""
    source = ""
    for name, suffix in re.findall(r"`(test_\w+)(\.py)?`", (DOCS / "security.md").read_text("utf-8")):
        if suffix:
            source = (ROOT / "tests" / f"{name}.py").read_text("utf-8")
        else:
            assert f"def {name}(" in source, name
    assert source


def test_the_recipes_name_what_there_is() -> None:
    """Each row begins with a file or a folder, which has the names of its second column."""
    rows = re.findall(r"^\| `([\w/.]+)` \| (.+) \|$", (DOCS / "extending.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 15
    for name, what in rows:
        path = ROOT / name
        assert path.exists(), name
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        source = "\n".join(file.read_text("utf-8") for file in files)
        for word in re.findall(r"`([\w/.]+)(?:\(.*?\))?`", what):
            assert (ROOT / word).exists() or word in source, (name, word)


def test_the_decision_on_dependencies_has_their_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["flash"]}
    page = (DOCS / "decisions" / "0002-dependencies.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)) == wanted


def test_the_pictures_of_the_chat_show_what_it_says_now_and_at_its_speed() -> None:
    """The README's was recorded on a busy machine once, at 4.6 tokens a second."""
    for name in ("session", "session-light"):
        picture = html.unescape((DOCS / f"{name}.svg").read_text("utf-8"))
        letters = "".join(re.findall("<text[^>]*>([^<]*)</text>", picture)).replace("\xa0", "")  # one by one
        assert WELCOME.replace(" ", "") in letters, name
        (speed,) = re.findall(r"tokens([\d.]+)tokens/s", letters)
        assert float(speed) > 30, name
