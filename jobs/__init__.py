"""One file per command; each docstring holds the whole command line."""
