"""`python -m lyrics VERB`."""

from lyrics.cli import main

main()
