"""The version of the distribution, read from its metadata so that it is written once, in pyproject.toml."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("weakseg")
except PackageNotFoundError:  # a bare checkout on sys.path
    __version__ = "0+checkout"
