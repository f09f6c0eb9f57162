"""The faults that training survives, as docs/reliability.md lists them: its tests exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"(tests/test_\w+\.py) -k (\w+)", PAGE)))
TABLE = PAGE.split("\n## ")[0]


def functions(path):
    """Names of the tests of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path, name):
    assert any(name in found for found in functions(path) if found.startswith("test_"))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"tests/\w+\.py", PAGE))))
def test_a_named_file_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    "fault",
    [
        *("kill -9 at any moment", "one rank killed", "one rank stalled"),
        *("out of memory in one rank", "a full disk", "a corrupt shard", "an unreadable image"),
        *("an empty caption", "a sample with no label", "a batch with no image"),
        *("NaN in pixels", "NaN in a teacher", "NaN in hidden states", "NaN in gradients"),
    ],
)
def test_the_table_has_the_fault_and_a_test_of_it(fault):
    (row,) = (line for line in TABLE.splitlines() if line.startswith(f"| {fault}"))
    assert re.search(r"`tests/test_\w+\.py -k test_\w+` \|$", row)
