"""Moves what changed in a directory tree to a storage. Knows nothing of Ray.

scan -> plan -> transfer -> manifest; ``sync.py`` runs them in that order.
"""
