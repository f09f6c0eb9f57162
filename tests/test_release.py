"""One version, and one number for each format of files, wherever they are written."""

import json
import re
from pathlib import Path

import pytest

import fastalign as fa
from fastalign import _manifest, adapters

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"^## \[(\d+)\.(\d+)\.(\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", re.MULTILINE)


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_newest_entry_of_the_changelog_is_of_this_version():
    entries = [
        (tuple(map(int, found[:3])), found[3]) for found in HEADING.findall(text("CHANGELOG.md"))
    ]
    versions = [version for version, _ in entries]
    assert ".".join(map(str, versions[0])) == fa.__version__
    assert versions == sorted(set(versions), reverse=True)
    assert all(date != "Unreleased" for _, date in entries[1:])
    # No heading has another form, and the kinds of change are those of Keep a Changelog.
    assert len(re.findall(r"^## ", text("CHANGELOG.md"), re.MULTILINE)) == len(entries)
    kinds = set(re.findall(r"^### (.+)$", text("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
        "Known limits",
    }


def test_the_readme_names_this_version():
    assert f"\nVersion {fa.__version__}," in text("README.md")


def test_the_version_is_written_once():
    assert 'dynamic = ["version"]' in text("pyproject.toml")
    assert not re.search(r"^version\s*=\s*\"", text("pyproject.toml"), re.MULTILINE)
    assert "version=" not in text("setup.py")


@pytest.mark.parametrize(
    ("row", "number"), [("adapter", adapters.FORMAT), ("checkpoint", _manifest.FORMAT)]
)
def test_the_documented_formats_are_those_written(row, number):
    (documented,) = re.findall(rf"^\| {row} \| .* \| (\d+) \|$", text("docs/releasing.md"), re.M)
    assert int(documented) == number


def test_an_adapter_records_its_format_and_another_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from fastalign.testing.models import tiny_llava

    model = tiny_llava()
    fa.attach(model, fa.AdapterConfig(shift_layers=(), calibration=True))
    fa.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    about = json.loads(path.read_text())
    assert about["format"] == adapters.FORMAT
    path.write_text(json.dumps(about | {"format": adapters.FORMAT + 1}))
    fa.detach(model)
    with pytest.raises(ValueError, match=f"of format {adapters.FORMAT}: got {adapters.FORMAT + 1}"):
        fa.load_adapter(model, tmp_path)
    assert not hasattr(model, "fastalign_adapter")
