"""The command line: a verb is a function. Nothing heavy is imported before a verb runs."""

from layershare.cli.app import main

__all__ = ["main"]
