"""Mirrors an experiment from its storage path, the fast tier, to ``SyncConfig(upload_dir)``.

``actor.py`` is the process that does it, and what the driver holds of that; ``mirroring.py``
decides what goes in which order, from the ``state.py`` that was taken, the checkpoints that
``pins.py`` keeps and the ``ledger.py`` of those that are there; ``spread.py`` has ``tasks.py`` done
on nodes, and ``start.py`` begins it all.
"""
