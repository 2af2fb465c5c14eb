"""`python -m schoolhouse` is the same program as `schoolhouse`."""

from schoolhouse.cli import main

main()
