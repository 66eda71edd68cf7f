"""Tests that take long, and that a quicker one beside them mostly covers."""

import os

import pytest

# On top of a function, or among the marks of one of its parameters.
long = pytest.mark.skipif(os.environ.get("LONG_TESTS") != "1", reason="LONG_TESTS=1 runs it")
