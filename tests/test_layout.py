"""The shape of the repository: one stem an op, imports that point down, no file that is run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "fastalign": ROOT / "fastalign",
    "fastalign_kernels": ROOT / "kernels/fastalign_kernels",
}
# Each floor may import itself and the floors before it.
FLOORS = [
    ["fastalign_kernels"],
    ["fastalign.reference"],
    ["fastalign.ops"],
    ["fastalign.losses", "fastalign.linalg", "fastalign.nn", "fastalign.metrics"],
    ["fastalign.models"],
    ["fastalign.adapters", "fastalign.data", "fastalign.objectives", "fastalign.teachers"],
    [
        *("fastalign.config", "fastalign.checkpoint", "fastalign.progress", "fastalign.train"),
        *("fastalign._manifest", "fastalign._run"),
    ],
    [
        *("fastalign.diagnostics", "fastalign.demo", "fastalign.integrations"),
        *("fastalign.cli", "fastalign.commands", "fastalign.settings", "fastalign.doctor"),
        "fastalign.planning",
        "fastalign.__main__",
    ],
]
# Files that may do what the others may not, each with its reason.
ALLOWED = {
    ("demo/teacher.py", "torch.load"): "weights of an installed package, with weights_only=True",
}


def floor_of(module: str) -> int | None:
    for i, floor in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in floor):
            return i
    return None


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    """Module name, path and syntax tree of every file of both packages."""
    for package, root in SOURCES.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            module = ".".join([package, *(part for part in parts if part != "__init__")])
            yield module, path, ast.parse(path.read_text())


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_on_load(tree: ast.Module) -> set[str]:
    """Imports outside functions and `if TYPE_CHECKING`."""
    names = set()
    for node in tree.body:
        lazy = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not lazy and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names |= imports(node)
    return names


def test_every_op_has_five_files_of_one_stem():
    ops = sorted(path.stem for path in (ROOT / "fastalign/ops").glob("[!_]*.py"))
    assert ops == [
        *("calibrate", "contrast_weights", "hadamard_reweight", "label_logits"),
        *("linear_cross_entropy", "structure_distill", "syrk"),
    ]
    for op in ops:
        for folder in ("fastalign/reference", "kernels/fastalign_kernels", "benchmarks"):
            assert (ROOT / folder / f"{op}.py").is_file(), f"{folder}/{op}.py"
        assert (ROOT / f"tests/test_{op}.py").is_file()


def test_every_kernel_module_is_an_op():
    kernels = {path.stem for path in SOURCES["fastalign_kernels"].glob("[!_]*.py")}
    ops = {path.stem for path in (ROOT / "fastalign/ops").glob("[!_]*.py")}
    assert kernels == ops | {"native"}  # the compiled kernels, of several ops


def test_kernels_is_a_source_root_and_no_package():
    # It would shadow Hugging Face's `kernels` in the checkout, and break `import transformers`.
    assert not (ROOT / "kernels/__init__.py").exists()
    assert [p.name for p in (ROOT / "kernels").iterdir() if (p / "__init__.py").exists()] == [
        "fastalign_kernels"
    ]


def test_imports_point_down():
    for module, _, tree in sources():
        if module == "fastalign" or module.startswith("fastalign.testing"):
            continue
        here = floor_of(module)
        assert here is not None, f"{module} stands on no floor: add it to FLOORS"
        for name in imports(tree):
            assert not name.startswith("fastalign.testing"), f"{module} imports {name}"
            if name.startswith("fastalign") and here < len(FLOORS) - 1:
                there = floor_of(name)
                assert there is not None, f"{module} imports {name}, which is no sub-module"
                assert there <= here, f"{module} imports {name}, a floor above it"


def test_testing_stands_alone():
    for module, _, tree in sources():
        if module.startswith("fastalign.testing"):
            outside = [n for n in imports(tree) if n.startswith("fastalign")]
            assert all(name.startswith("fastalign.testing") for name in outside), module


def test_reference_and_kernels_need_little():
    for module, _, tree in sources():
        packages = {name.split(".")[0] for name in imports(tree)} - sys.stdlib_module_names
        if module.startswith("fastalign.reference"):
            assert packages <= {"torch", "fastalign"}, module
        if module.startswith("fastalign_kernels"):
            assert packages <= {"torch", "triton", "fastalign_kernels"}, module


def test_kernels_are_imported_where_they_run():
    for module, _, tree in sources():
        if module.split(".")[0] == "fastalign":
            for name in imported_on_load(tree):
                if name != "fastalign_kernels.native":  # of the CPU; it needs torch only
                    assert name.split(".")[0] not in ("triton", "fastalign_kernels"), module


def test_runs_without_triton_and_transformers():
    script = """
import sys
sys.modules |= {"triton": None, "transformers": None}
import torch
import fastalign as fa
x = torch.ones(2, 3)
y = fa.ops.calibrate(x, torch.tensor([True, False]), 2 * x[0], x[0])
assert y.tolist() == [[3.0] * 3, [1.0] * 3]
assert torch.equal(fa.ops.hadamard_reweight(x, x), x)
assert fa.ops.label_logits(x, x, torch.tensor([1, -100])).tolist() == [3.0, 0.0]
x.requires_grad_()
fa.losses.linear_cross_entropy(x, x, torch.tensor([1, -100])).backward()
assert x.grad.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def suspects(tree: ast.Module) -> set[str]:
    """What runs a stranger's code, or lets the environment choose what is computed."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & {"eval", "exec", "__import__"}
        if isinstance(node, ast.keyword):
            found |= {node.arg} & {"trust_remote_code", "allow_pickle", "shell"}
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.add("trust_remote_code")
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            known = ("os.environ", "os.getenv", "os.putenv", "os.system", "torch.load")
            known += ("torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
            found |= {name} & set(known)
            found |= {node.attr} & {"extractall", "unpack_archive"}  # paths of the archive's own
    unsafe = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
    found |= {name.split(".")[0] for name in imports(tree)} & set(unsafe)
    return found | ({"os.environ", "os.getenv"} & imports(tree))


def test_package_runs_no_file_and_reads_no_environment():
    found = {
        (path.relative_to(SOURCES[module.split(".")[0]]).as_posix(), suspect)
        for module, path, tree in sources()
        for suspect in suspects(tree)
    }
    assert found == ALLOWED.keys()


def test_torch_load_reads_weights_only():
    for module, _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", module


@pytest.mark.parametrize(
    ("code", "suspect"),
    [
        ("eval('1')", "eval"),
        ("import pickle", "pickle"),
        ("from os import environ", "os.environ"),
        ("import os\nos.environ.get('A')", "os.environ"),
        ("load(trust_remote_code=True)", "trust_remote_code"),
        ("load(**{'trust_remote_code': True})", "trust_remote_code"),
        ("import numpy\nnumpy.load('f', allow_pickle=True)", "allow_pickle"),
        ("import yaml\nyaml.load(f, yaml.Loader)", "yaml.load"),
        ("import subprocess\nsubprocess.run(x, shell=True)", "shell"),
        ("tarfile.open(f).extractall('.')", "extractall"),
        ("import torch\ntorch.load('f')", "torch.load"),
    ],
)
def test_the_check_sees_what_it_looks_for(code, suspect):
    assert suspects(ast.parse(code)) == {suspect}
    assert suspects(ast.parse("model.eval(); torch.equal(a, b)")) == set()
