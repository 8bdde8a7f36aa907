"""A small checkpoint in fp32, and in the ``precision`` of a module's own fixture."""

import pytest

import loaders
from loaders.base import LoadedModel, ModelSpec
from tests.loaders.contract import load


@pytest.fixture(scope="module")
def reference(small_spec: ModelSpec) -> LoadedModel:
    return loaders.load("fp32", small_spec)


@pytest.fixture(scope="module")
def model(precision: str, small_spec: ModelSpec) -> LoadedModel:
    return load(precision, small_spec)
