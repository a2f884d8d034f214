"""``python -m sddit``: the same as the command ``sddit``."""

from sddit.cli import main

main()
