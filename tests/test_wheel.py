"""What is installed: both packages with their data, from every way in, importable anywhere."""

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


def copy_of_the_checkout(folder):
    """The files that git would carry, without what builds left in the working tree."""
    listed = call("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        target = folder / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


PURE = {"CXX": "no-such-compiler"}  # as with build isolation, where torch is absent
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="no C++ compiler is installed"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel built from the sdist, and the sdist."""
    source = copy_of_the_checkout(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out, **PURE)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def compiled(built, tmp_path_factory):
    """Wheel with the compiled kernels, from the sdist; not optimised, which takes half as long."""
    out = tmp_path_factory.mktemp("compiled")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    call(*pip, "--wheel-dir", out, built[1], cwd=out, CFLAGS="-O0")
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
    wheel, _ = built
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastalign", "fastalign_kernels"}
    assert any(name.endswith("entry_points.txt") for name in names)
    assert "fastalign/demo/assets/base/model.safetensors" in names
    assert sum(name.startswith("fastalign/demo/assets/sprites/") for name in names) == 24
    assert any(name.endswith("LICENSE-OFL.txt") for name in names)
    assert not any(name.endswith((".so", ".cpp", ".h")) for name in names)
    # No folder of the wheel may shadow Hugging Face's package `kernels`.
    assert not any(name.startswith("kernels/") for name in names)


def test_sdist_holds_the_sources_of_the_compiled_kernels(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {"csrc/module.c", "csrc/cpu/rows.h"} <= sources <= names
    assert not any(name.endswith((".so", ".o")) for name in names)


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
    with pytest.raises(AssertionError, match="no-such-option"):
        call(*pip, "--wheel-dir", tmp_path, built[1], cwd=tmp_path, CFLAGS="-fno-such-option")
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
