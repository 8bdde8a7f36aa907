"""The report: size, speed and quality of a model's precisions on this host, and a recommendation.

``measuring`` takes the figures step by step and ``store`` saves each; ``rows`` and ``advice`` evaluate them;
``markdown``, ``page`` and ``plots`` render them; ``choice`` selects a precision from them for "auto".
"""
