"""`python -m dbrx_cli` equals `dbrx`."""

from .app import main

main()
