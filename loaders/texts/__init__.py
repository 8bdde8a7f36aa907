"""Texts that models are measured, calibrated and trained on, as streams of tokens."""

from loaders.texts.text import Text, TextError, TokenStream, held_out, text_file

__all__ = ["Text", "TextError", "TokenStream", "held_out", "text_file"]
