"""Python imports this at start-up of every process that has this folder on its path."""

from tests.emulated_card import start

start.begin()
