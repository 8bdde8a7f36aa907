"""The version, in one place: what the package was installed as."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("bitdial")
except PackageNotFoundError:  # run from a folder without installing
    VERSION = "0+unknown"
