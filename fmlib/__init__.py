"""The geometry of deep vision features: the package behind the book.

Lower floors know nothing of higher ones: ``images``, ``stats``, ``store`` (no model in sight);
``encoders``, ``taps``, ``extract``; one module per method: of invariance ``shift``, ``phases``,
``scenes``, ``consistency``, ``probes``, ``spectrum``, ``antialias``, of maps ``edits``,
``editors``, ``maps``, ``trained_maps``, ``map_scores``, ``map_algebra``, of inversion
``descriptors``, ``preimage``, ``null_space``; ``plots``, ``widgets``, ``explorers``; ``runs``,
``prose``, ``book`` and the command line.
"""

__version__ = "0.1.0"
