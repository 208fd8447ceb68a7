"""The version, in this one place: setuptools reads it from this source without importing the package."""

__version__ = "0.1.0"
