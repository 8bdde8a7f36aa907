"""Python runs this when it starts, in every process below one that has the folder on its path."""

from tests.emulated_card import start

start.begin()
