"""``python -m mambacompress``."""

from mambacompress.cli import main

main()
