"""The two packages, which live in two source roots; everything else is in pyproject.toml.

`kernels/` sits beside `fastalign/`, so the packages are listed here by hand: automatic discovery
would leave the kernels out of the wheel without a word.
"""

from setuptools import find_packages, setup

setup(
    package_dir={"fastalign_kernels": "kernels/fastalign_kernels"},
    packages=[*find_packages(include=["fastalign", "fastalign.*"]), *find_packages("kernels")],
    package_data={
        "fastalign": ["py.typed"],
        "fastalign.demo": ["assets/*", "assets/*/*"],
        "fastalign_kernels": ["py.typed"],
    },
)
