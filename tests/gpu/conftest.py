"""The tiny checkpoint of the engine's tests."""

from tests.runtime.conftest import tiny

__all__ = ["tiny"]
