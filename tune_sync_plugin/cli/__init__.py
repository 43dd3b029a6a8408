"""``tune-sync``, the command line: looks at what is in storage, on any machine.

A module per command, and ``main`` for arguments, output and exit codes. Nothing here runs during an
experiment, and only ``doctor`` with a cluster needs Ray.
"""
