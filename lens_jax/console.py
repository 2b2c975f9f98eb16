"""The console that everything is said on."""

from rich.console import Console


def make_console(stderr: bool = False) -> Console:
    """A console that neither colours numbers nor breaks lines: a path in a log must stay one word.

    Text in brackets is printed as it is: a folder may be named `my [v1]`, and rich would take `[/x]` for an error.
    """
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
