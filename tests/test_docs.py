"""The documentation is true: its examples run, its names exist, its options and files parse.

A ```python block runs in a fresh namespace and a folder of its own. Where a ```text block follows
it directly, that is what it prints. `<!-- not run: reason -->` on the line before a block excuses
it from running, not from being Python.
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import fastalign as fa
from fastalign import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXCUSE = re.compile(r"<!-- not run: \S.* -->")
MAX_EXCUSED = 4


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of content, counted from 1."""

    page: Path
    line: int
    language: str
    text: str
    excused: bool
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    lines = text.splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page.name} leaves a fence open"
    pairs = list(zip(fences[::2], fences[1::2], strict=True))
    found = []
    for place, (start, end) in enumerate(pairs):
        excused = start > 0 and EXCUSE.fullmatch(lines[start - 1]) is not None
        output = None
        if place + 1 < len(pairs):
            following, close = pairs[place + 1]
            between = "".join(lines[end + 1 : following]).strip()
            if lines[following] == "```text" and not between:
                output = "\n".join(lines[following + 1 : close])
        content = "\n".join(lines[start + 1 : end])
        found.append(Block(page, start + 2, lines[start][3:].strip(), content, excused, output))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text(encoding="utf-8"))]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def compiled(block: Block) -> Any:
    """The block's code, with the line numbers of its page."""
    return compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("block", [b for b in PYTHON if not b.excused], ids=str)
def test_example_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    exec(compiled(block), {"__name__": "__main__"})
    if block.output is not None:
        assert capsys.readouterr().out.rstrip() == block.output.rstrip()


def test_few_examples_are_excused():
    excused = [block for block in PYTHON if block.excused]
    assert len(excused) <= MAX_EXCUSED
    for block in excused:
        compiled(block)


def test_blocks_are_found_with_their_output():
    text = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\n"
    text += "<!-- not run: why -->\n```python\nx\n```"
    first, _, last = blocks_of(Path("page.md"), text)
    assert (first.line, first.text, first.output, first.excused) == (3, "print(1)", "1", False)
    assert last.excused and last.output is None


# -- the command line and its files --------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_settings_load(block, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(block.text, encoding="utf-8")
    config = cli.load_config(path, fa.TrainConfig)
    assert config != fa.TrainConfig()


def test_every_setting_is_explained():
    table = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert explained == {field.name for field in dataclasses.fields(fa.TrainConfig)}


def commands() -> dict[str, set[str]]:
    """Options that the documentation names, by command of `fastalign` and its own command."""
    found: dict[str, set[str]] = {}
    for block in (b for b in BLOCKS if b.language in ("sh", "bash")):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["fastalign"]:
                options = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
                command = " ".join(words[1 : 3 if words[1] == "diagnose" else 2])
                found.setdefault(command, set()).update(options)
    return found


@pytest.mark.parametrize("command", sorted(commands()))
def test_options_exist(command, capsys):
    assert command.split()[0] in cli.COMMANDS
    assert cli.main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    known = set(re.findall(r"--[\w.-]+", shown))
    named = {option.replace("_", "-") for option in commands()[command]}  # tyro takes both
    assert not named - known


# -- names ---------------------------------------------------------------------------------------

ENTRY = re.compile(r"^- `(fastalign\.[\w.]+)(\(.*\))?`: \S", re.MULTILINE)
ENTRIES = ENTRY.findall((ROOT / "docs/api.md").read_text(encoding="utf-8"))
LISTED = {name for name, _ in ENTRIES}
# Modules whose every public name is listed: those of `__all__`, else what the module defines.
COMPLETE = (
    "fastalign", "fastalign.losses", "fastalign.linalg", "fastalign.metrics", "fastalign.nn",
    "fastalign.ops", "fastalign.objectives", "fastalign.adapters", "fastalign.teachers",
    "fastalign.data", "fastalign.diagnostics", "fastalign.planning",
)  # fmt: skip


def resolve(name: str) -> Any:
    """The object behind a dotted name; `fastalign.train` is the function, and a module too."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        found: Any = importlib.import_module(".".join(parts[:end]))
        with contextlib.suppress(AttributeError):
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise AttributeError(name)


def public_names(module: ModuleType) -> set[str]:
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(module.__name__)
    }


def normal(signature: str) -> str:
    return ast.dump(ast.parse(f"def f{signature}: ..."))


def signature_of(value: Any) -> str:
    """Names, kinds and defaults; no annotations, no `self`."""
    signature = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


@pytest.mark.parametrize(("name", "signature"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_listed_name_exists(name, signature):
    value = resolve(name)
    if signature:
        assert normal(signature) == normal(signature_of(value)), signature_of(value)
    else:
        # What can be called is listed with its arguments, unless it is a table of settings.
        assert not inspect.isfunction(value)


@pytest.mark.parametrize("module", COMPLETE)
def test_public_names_are_listed(module):
    names = {f"{module}.{name}" for name in public_names(importlib.import_module(module))}
    if module != "fastalign":  # what fastalign gives again is listed there
        names -= {f"{module}.{name}" for name in fa.__all__}
    assert not names - LISTED


def test_methods_of_the_model_view_are_listed():
    methods = {f"fastalign.VLM.{name}" for name in vars(fa.VLM) if not name.startswith("_")}
    assert not methods - LISTED


def test_the_reference_shows_every_class_and_function():
    """It is made of docstrings when the site is built, of the names that its pages hold."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md")]
    shown = [resolve(name) for name in re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE)]
    assert len(shown) == len({id(value) for value in shown})
    for name in LISTED:
        value = resolve(name)
        method = inspect.isclass(resolve(name.rpartition(".")[0]))
        if (inspect.isclass(value) or inspect.isfunction(value)) and not method:
            assert any(value is other for other in shown), name


# -- the files themselves ------------------------------------------------------------------------

LOCAL = re.compile(r"(?<![\w.~:/-])(?:/(?:home|Users|root|work|mnt)/\w|[A-Z]:\\Users\\)")


def project_files() -> list[Path]:
    """Files that are tracked or would be; all of them where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return [path for path in ROOT.rglob("*") if path.is_file()]
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_holds_a_local_path():
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in LOCAL.finditer(text)]
    assert not found


def test_the_search_for_local_paths_sees_them():
    for text in ("see /" + "home/me/x", "(/" + "work/out", "C:" + "\\Users\\me"):
        assert LOCAL.search(text)
    for text in ("frame/" + "work/x", "https://a.org/" + "home/x"):
        assert not LOCAL.search(text)


def test_pages_link_to_pages_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"\w+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- .+: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)
