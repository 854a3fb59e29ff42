"""The command line of DBRX."""

__version__ = "0.1.0.dev0"
