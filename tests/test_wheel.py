"""What is installed: both packages with their data, from every way in, importable anywhere."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastalign

ROOT = Path(__file__).parents[1]
# Run far from the checkout: what only a working directory provides must not be found.
CHECK = """
import sys
sys.modules["triton"] = None
import fastalign, fastalign_kernels, transformers
from pathlib import Path
from fastalign.demo.base import load_base
from fastalign.demo.scenes import scenes
assert len(fastalign.VLM(load_base()).layers) == 4
assert scenes(2, seed=0).images.shape == (2, 64, 64, 3)
kernels = {p.name for p in Path(fastalign_kernels.__file__).parent.glob("*.py")}
assert {"calibrate.py", "hadamard_reweight.py", "label_logits.py", "_op.py"} <= kernels, kernels
for package in (fastalign, fastalign_kernels):
    assert (Path(package.__file__).parent / "py.typed").is_file()
print(fastalign.__version__, fastalign.__file__)
"""


def call(*command, cwd, **env):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def carried():
    """The names that git would carry, without what builds left in the working tree."""
    listed = call("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    return {name for name in listed if name and (ROOT / name).is_file()}


def copy_of_the_checkout(folder):
    for name in carried():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


# As with build isolation, where torch is absent; the time of a release is that of its commit.
PURE = {"CXX": "no-such-compiler", "SOURCE_DATE_EPOCH": "1800000000"}
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="no C++ compiler is installed"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_of_the_checkout(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """Wheel built from the sdist, and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out, **PURE)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def compiled(built, tmp_path_factory):
    """Wheel with the CPU's compiled kernels, from the sdist; not optimised, in half the time."""
    out = tmp_path_factory.mktemp("compiled")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    call(*pip, "--wheel-dir", out, built[1], cwd=out, CFLAGS="-O0", FASTALIGN_CUDA="0")
    return next(out.glob("*.whl"))


def doctor(site, folder):
    """What `fastalign doctor` reports of the ops installed in `site`."""
    code = "from fastalign.cli import main; raise SystemExit(main(['doctor', '--json', 'r.json']))"
    call(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(site))
    rows = json.loads((folder / "r.json").read_text())["ops"]
    return {row["op"]: (row["path"], row["why"]) for row in rows}


def test_wheel_from_the_sdist_imports_anywhere(built, tmp_path):
    wheel, sdist = built
    assert wheel.name.endswith("-py3-none-any.whl")
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target)
    call(*pip, wheel, cwd=empty)
    out = call(sys.executable, "-c", CHECK, cwd=empty, PYTHONPATH=str(target))
    assert str(target) in out
    # The same from the checkout: its folder `kernels` must not hide anything.
    call(sys.executable, "-c", CHECK, cwd=ROOT, PYTHONPATH=str(target))


def test_wheel_holds_the_packages_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    # No folder of it may shadow Hugging Face's package `kernels`; no tests, benchmarks or csrc.
    packages = {
        name.removeprefix("kernels/")
        for name in carried()
        if name.startswith(("fastalign/", "kernels/fastalign_kernels/"))
    }
    assert {"fastalign/py.typed", "fastalign_kernels/py.typed"} <= packages
    assert "fastalign/demo/assets/base/model.safetensors" in packages
    assert sum(name.startswith("fastalign/demo/assets/sprites/") for name in packages) == 24
    assert names - about == packages
    assert {Path(name).name for name in about} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"),
        *("LICENSE", "LICENSE-OFL.txt"),
    }


def test_sdist_holds_the_repository(built):
    with tarfile.open(built[1]) as archive:
        files = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    made = {name for name in files if name.startswith("fastalign.egg-info/")}
    # A file left out would be missed by those who build from it, so each is named here.
    assert files - made - {"PKG-INFO", "setup.cfg"} == carried() - {".ci/run", ".gitignore"}
    assert {"csrc/module.c", "csrc/cpu/rows.h", "LICENSE", "constraints.txt"} <= files


def test_wheel_of_the_checkout_is_that_of_the_sdist_byte_for_byte(built, source, tmp_path):
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path)
    call(*build, source, cwd=tmp_path, **PURE)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == built[0].name
    assert wheel.read_bytes() == built[0].read_bytes()


def test_metadata(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    about = email.message_from_bytes(archive.read(name))
    assert (about["Name"], about["Version"]) == ("fastalign", fastalign.__version__)
    assert built[1].name == f"fastalign-{fastalign.__version__}.tar.gz"
    assert about["License-Expression"] == "Apache-2.0 AND OFL-1.1"
    assert about["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert about.get_payload(decode=True).decode() == readme
    # Three and no more are installed beside torch; each extra is explained to who installs it.
    always = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    names = [re.match(r"[\w-]+", line)[0] for line in always]
    assert names == ["torch", "numpy", "safetensors", "torchmetrics", "triton"]
    rows = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` +\|", rows, re.M)) == set(
        about.get_all("Provides-Extra")
    )
    lowest = about["Requires-Python"].removeprefix(">=")
    versions = [c.split(" :: ")[-1] for c in about.get_all("Classifier") if "Python :: 3." in c]
    assert versions[0] == lowest and versions == sorted(versions, key=lambda v: int(v[2:]))


# Leaves to be found what an installation without extras brings, and nothing else.
BARE = """
import importlib.metadata as metadata, re, sys
from importlib.machinery import PathFinder
from packaging.requirements import Requirement

def normal(name): return re.sub(r"[-_.]+", "-", name).lower()

wanted, allowed = ["fastalign"], set()
while wanted:
    name = normal(wanted.pop())
    if name not in allowed:
        allowed.add(name)
        needs = map(Requirement, metadata.requires(name) or [])
        wanted += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
held = metadata.packages_distributions()
hidden = {module for module, names in held.items() if not {*map(normal, names)} & allowed}
assert {"transformers", "tyro", "rich", "PIL", "yaml"} <= hidden

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*context):
        found = PathFinder.find_distributions(*context)
        return (each for each in found if normal(each.metadata["Name"]) in allowed)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def test_without_extras_the_first_example_and_doctor_run(built, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target)
    call(*pip, built[0], cwd=empty)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert "structure_distill" in first
    code = BARE + first + "from fastalign.cli import main\nraise SystemExit(main(['doctor']))"
    shown = call(sys.executable, "-c", code, cwd=empty, PYTHONPATH=str(target))
    assert re.search(r"^  transformers +-$", shown, re.M)
    assert re.search(rf"^  fastalign +{re.escape(fastalign.__version__)}$", shown, re.M)
    assert re.search(r"^  hf +no +transformers, accelerate", shown, re.M)
    assert "losses.structure_distill" in shown


@needs_compiler
def test_compiled_wheel_imports_anywhere_and_says_what_is_in_use(compiled, tmp_path):
    # One binary for Python 3.10 and later.
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", compiled.name)
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target)
    call(*pip, compiled, cwd=empty)
    assert (target / "fastalign_kernels/_C.abi3.so").is_file()
    code = CHECK + (
        "from fastalign_kernels import native\n"
        "assert native.OBSTACLE is None, native.OBSTACLE\n"
        "print(native.__file__, native.instructions())"
    )
    assert str(target) in call(sys.executable, "-c", code, cwd=empty, PYTHONPATH=str(target))
    if not torch.cuda.is_available():
        path, why = doctor(target, empty)["ops.calibrate"]
        assert path == "compiled" and why.startswith("on the CPU, ")
        (target / "fastalign_kernels/_C.abi3.so").unlink()
        path, why = doctor(target, empty)["ops.calibrate"]
        assert path == "torch" and "not built: pip install --no-build-isolation" in why


@needs_compiler
def test_a_failing_compilation_fails_the_build(built, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    fails = {"CFLAGS": "-fno-such-option", "FASTALIGN_CUDA": "0"}
    with pytest.raises(AssertionError, match="no-such-option"):
        call(*pip, "--wheel-dir", tmp_path, built[1], cwd=tmp_path, **fails)
    assert not list(tmp_path.glob("*.whl"))


def test_editable_install_imports_anywhere(tmp_path):
    source = copy_of_the_checkout(tmp_path / "source")
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    call(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--target", target, "--editable", source),
        cwd=empty,
        **PURE,
    )
    # .pth files are read in site folders only, so name the folder as one.
    activate = f"import site; site.addsitedir({str(target)!r})\n"
    environment = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    out = call(sys.executable, "-c", activate + CHECK, cwd=empty, **environment)
    assert str(source) in out or str(ROOT) in out


def test_import_is_light_and_needs_neither_triton_nor_transformers():
    code = """
import sys
import torch
for name in ("triton", "transformers", "accelerate", "torchmetrics", "matplotlib", "PIL"):
    sys.modules[name] = None
before = set(sys.modules)
import fastalign
assert callable(fastalign.train) and fastalign.losses.structure_distill
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded - set(sys.stdlib_module_names)))
"""
    # Beyond torch and the standard library it loads itself alone, so it costs what its files do.
    loaded = call(sys.executable, "-c", code, cwd="/").strip()
    assert loaded == "['fastalign', 'fastalign_kernels']"
