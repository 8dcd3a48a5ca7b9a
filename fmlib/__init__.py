"""The geometry of deep vision features: the package behind the book.

Lower floors know nothing of higher ones: ``images``, ``stats``, ``store`` (no model in sight);
``encoders``, ``taps``, ``extract``; one module per method (``shift``, ``phases``, ``probes``,
``spectrum``, ``antialias``); ``plots``, ``widgets``; ``runs``, ``book`` and the command line.
"""

__version__ = "0.1.0"
