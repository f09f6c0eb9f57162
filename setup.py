"""The two packages, which live in two source roots, and the optional extension.

`kernels/` sits beside `fastalign/`, so the packages are listed here by hand: automatic discovery
would leave the kernels out of the wheel without a word. The compiled kernels are built where torch
and a C++ compiler are at hand, which means `pip install --no-build-isolation`; else the wheel is
pure Python. Everything else is in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))  # a build from a wheel's front end lacks it
from csrc.build import extension  # noqa: E402

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
