"""How `fastalign_kernels._C` is built, for setup.py: the CPU's part by torch, CUDA's by nvcc.

torch's builder refuses CUDA beside a torch without it, but one library serves every torch: nvcc is
called here, its runtime is linked in, and what torch with CUDA adds is looked up when it is loaded.

CUDA kernels are built where nvcc is found, on PATH or in CUDA_HOME, and FASTALIGN_CUDA is not 0.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CPU = ("avx2", "avx512", "avx512_bf16", "kernels", "ops", "plain", "structure_distill")
CUDA = ("hadamard_reweight", "inverse_norms")

FLAGS = ["-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
FLAGS += [] if "-g" in os.environ.get("CFLAGS", "") else ["-g0"]  # Python adds -g
FLAGS += [f"-ffile-prefix-map={Path.cwd()}=."]  # the same library from any folder
FLAGS += ["-ffp-contract=off"]  # what cancels exactly cancels in every instruction set
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # of lanes wider than registers, and of GCC 12
STABLE = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10 and later
FLAGS += STABLE

NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
ARCHITECTURES = ("80", "90a", "100")  # and PTX of the last, for GPUs to come


def nvcc() -> str | None:
    """The CUDA compiler, or None where there is none or it is not asked for."""
    if os.environ.get("FASTALIGN_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def _architectures(compiler: str) -> list[str]:
    """nvcc's arguments for what it knows of the architectures."""
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}\n" in listed]
    if not known:
        raise RuntimeError(f"{compiler} knows no sm_80: set FASTALIGN_CUDA=0 or take a newer")
    codes = [f"arch=compute_{a},code=sm_{a}" for a in known]
    last = known[-1].rstrip("a")
    codes.append(f"arch=compute_{last},code=compute_{last}")
    return [word for code in codes for word in ("-gencode", code)]


def toolkit(compiler: str) -> Path:
    """The folder of the CUDA toolkit; the nvcc on PATH may be a script that calls the real one."""
    said = subprocess.run([compiler, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    found = re.search(r"_HERE_=(.+)", said)
    if found is None:
        raise RuntimeError(f"{compiler} does not say where it lies: FASTALIGN_CUDA=0 does without")
    return Path(found[1].strip()).parent


def _compile(compiler: str, folder: Path) -> list[str]:
    """Objects of the CUDA units, made again where a source is newer."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [p for p in Path("csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".py")]
    newest = max(path.stat().st_mtime for path in sources)
    flags = [*NVCC_FLAGS, *_architectures(compiler), "--threads", "0"]

    def one(unit: str) -> str:
        made = folder / f"{unit}.o"
        if not made.is_file() or made.stat().st_mtime < newest:
            command = [compiler, *flags, "-c", f"csrc/cuda/{unit}.cu", "-o", str(made)]
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
        return str(made)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, CUDA))


def extension() -> dict[str, Any]:
    """Arguments of `setup`: none where torch or a C++ compiler is missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or not compiler or not shutil.which(compiler[0]):
        return {}
    of_cuda = nvcc()

    class Build(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            if of_cuda is not None:
                built = _compile(of_cuda, Path(self.build_temp) / "cuda")
                self.extensions[0].extra_objects = built
            super().build_extensions()

    sources = [f"csrc/cpu/{unit}.cpp" for unit in CPU]
    sources += ["csrc/cuda/ops.cpp"] if of_cuda else []
    link = ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
    compiled = CppExtension(
        "fastalign_kernels._C",
        ["csrc/module.c", *sources],
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        libraries=["cudart_static"] if of_cuda else [],
        library_dirs=[str(toolkit(of_cuda) / "lib64")] if of_cuda else [],
        extra_compile_args={"cxx": FLAGS},
        extra_link_args=link if of_cuda else [],
        py_limited_api=True,
    )
    return {
        "ext_modules": [compiled],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
