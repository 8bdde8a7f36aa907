"""Compiles the CPU kernels into the wheel and tags it by its contents; the rest is in pyproject.toml.

With kernels the wheel is for Linux on x86-64 with a C library as new as they need. Without (no compiler, or
another platform) it is pure Python, and torch's own kernels compute.
"""

import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("loaders/kernels")
NEEDED = {b"libc.so.6", b"libm.so.6", b"ld-linux-x86-64.so.2"}  # present wherever manylinux wheels run


class BuildKernels(build_py):
    """Compiles in the build folder: the source's may be read-only. An editable install compiles nothing."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            subprocess.run([sys.executable, Path(self.build_lib) / KERNELS / "build.py"], check=True)


class TaggedWheel(bdist_wheel):
    """``py3-none-any`` without kernels, ``py3-none-manylinux_2_…`` with them."""

    def get_tag(self) -> tuple[str, str, str]:
        libraries = [path.read_bytes() for path in (Path(self.bdist_dir) / KERNELS).glob("*.so")]
        if not libraries:
            python, abi, platform = super().get_tag()
            return python, abi, platform
        self.root_is_pure, self.plat_name_supplied = False, True
        self.plat_name = manylinux(libraries) or "linux_x86_64"
        return "py3", "none", self.plat_name


def manylinux(libraries: list[bytes]) -> str | None:
    """The platform tag by the newest symbols of glibc in use; None if other libraries are needed."""
    content = b"\0".join(libraries)
    versions = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", content)]
    if not versions or set(re.findall(rb"\0((?:lib|ld-)[\w.+-]*\.so[\d.]*)(?=\0)", content)) - NEEDED:
        return None
    return f"manylinux_2_{max(*versions, 17)}_x86_64"  # PEP 600 begins with 2.17: older ones have other names


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": TaggedWheel})
