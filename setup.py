"""The two packages, which live in two source roots, and the optional extension.

`kernels/` sits beside `fastalign/`, so the packages are listed here by hand: automatic discovery
would leave the kernels out of the wheel without a word. The compiled kernels are built where torch
and a C++ compiler are at hand, which means `pip install --no-build-isolation`; else the wheel is
pure Python. Everything else is in pyproject.toml.
"""

import os
import shlex
import shutil
import sys
from typing import Any

from setuptools import find_packages, setup

UNITS = ("avx2", "avx512", "avx512_bf16", "kernels", "ops", "plain", "structure_distill")
FLAGS = ["-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
FLAGS += ["-ffp-contract=off"]  # what cancels exactly cancels in every instruction set
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # of lanes wider than registers, and of GCC 12
FLAGS += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10 and later


def extension() -> dict[str, Any]:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or not compiler or not shutil.which(compiler[0]):
        return {}
    compiled = CppExtension(
        "fastalign_kernels._C",
        ["csrc/module.c", *(f"csrc/cpu/{name}.cpp" for name in UNITS)],
        depends=[f"csrc/cpu/{name}.h" for name in ("gram", "kernels", "lanes", "rows")],
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
    )
    return {
        "ext_modules": [compiled],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    package_dir={"fastalign_kernels": "kernels/fastalign_kernels"},
    packages=[*find_packages(include=["fastalign", "fastalign.*"]), *find_packages("kernels")],
    package_data={
        "fastalign": ["py.typed"],
        "fastalign.demo": ["assets/*", "assets/*/*"],
        "fastalign_kernels": ["py.typed"],
    },
    **extension(),
)
