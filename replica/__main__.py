"""`python -m replica` is the command `replica`."""

from replica.cli.main import main

main()
