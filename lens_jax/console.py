"""The console that everything is said on."""

from rich.console import Console


def make_console(stderr: bool = False) -> Console:
    """A console that neither colours numbers nor breaks lines: a path in a log must stay one word."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)
