"""Build of vllm_specplus: two package roots, vLLM's entry points and the optional C++ kernels.

The kernels are one plain shared library (a C ABI for ctypes, no Python or torch headers). Without a
compiler, or where it fails, the installation goes on and the portable torch path runs instead;
`python setup.py build_ext --inplace` shows what the compiler said.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vllm_specplus/__init__.py").read_text())[1]
KERNELS = Path("kernels/specplus_kernels")
SOURCES, HEADERS = (sorted(map(str, KERNELS.glob(p))) for p in ("*/cpu.cpp", "*/*.h"))
# No -ffast-math: NaN and infinity must keep their meaning. `native` because the library is built
# where it runs.
KERNEL_FLAGS = (
    "-O3 -march=native -fno-math-errno -ffp-contract=fast -fopenmp -shared -fPIC -std=c++17"
)


class BuildKernels(build_ext):
    """Compiles all cpu.cpp files into specplus_kernels/_cpu_kernels.so with one command."""

    def get_ext_filename(self, fullname: str) -> str:
        """The plain name that ctypes loads, without Python's ABI tag."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Runs the compiler; what fails is reported in one line and leaves no old library."""
        built = Path(self.get_ext_fullpath(ext.name))
        built.unlink(missing_ok=True)
        built.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or next(
            filter(shutil.which, ("g++", "c++", "clang++")), ""
        )
        command = [*compiler.split(), *KERNEL_FLAGS.split(), *ext.sources, "-o", str(built)]
        try:
            if not compiler:
                raise FileNotFoundError("no C++ compiler (g++, c++ or clang++) was found")
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"specplus_kernels: C++ kernels are left out, torch runs instead: {error}")

    def copy_extensions_to_source(self) -> None:
        """For editable installs: an old library must not outlive a failed build."""
        for ext in self.extensions:
            (ROOT / "kernels" / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


setup(
    name="vllm_specplus",
    version=VERSION,
    description="Speculative decoding for stock vLLM: MTP, token trees, one exact verifier",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[
        *find_packages(include=["vllm_specplus", "vllm_specplus.*"]),
        *find_packages("kernels", include=["specplus_kernels", "specplus_kernels.*"]),
    ],
    package_dir={"specplus_kernels": "kernels/specplus_kernels"},
    ext_modules=[
        Extension("specplus_kernels._cpu_kernels", SOURCES, depends=HEADERS, optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
    install_requires=["vllm>=0.32,<0.34", "pydantic>=2", "rich>=13", "typer>=0.15", "wrapt>=1.16"],
    extras_require={
        "dev": [
            "types-psutil",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
            "scipy",
        ],
        "demo": ["accelerate", "gguf", "matplotlib"],
    },
    entry_points={
        "vllm.general_plugins": ["specplus = vllm_specplus.plugin:register"],
        "vllm.platform_plugins": ["specplus = vllm_specplus.plugin:platform_plugin"],
        "console_scripts": ["vllm-specplus = vllm_specplus.cli:main"],
    },
)
