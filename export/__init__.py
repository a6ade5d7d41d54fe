"""Exits to other runtimes; one target a file."""
