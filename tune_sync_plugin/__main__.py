"""``python -m tune_sync_plugin`` is ``tune-sync``; all of it is in ``cli``."""

from __future__ import annotations

import sys

from tune_sync_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
