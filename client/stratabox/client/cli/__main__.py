"""`python -m stratabox.client.cli`: the same as `stratabox`."""

from stratabox.client.cli import main

main()
