"""The report: every precision of a model measured on this host and one text, and what follows from it.

``measure`` makes the figures step by step and ``store`` keeps each; ``rows`` and ``advice`` say what they
come to; ``markdown``, ``page`` and ``plots`` show it. ``choice`` picks a precision by it for "auto".
"""
