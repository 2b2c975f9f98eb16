"""Errors and warnings a user can act on."""


class LensError(Exception):
    """Bad input: a file, key or value that cannot be used.

    The message is one line that names the offender and what would be accepted. The command line prints it without a
    traceback and exits with code 2.
    """


class LensWarning(UserWarning):
    """Input that is used, but not all of it or not as it may be meant. The command line prints the message alone."""


def nearest(name: str, known) -> str:
    """` (did you mean ...?)` for the known name closest to `name`, or an empty string when nothing is close."""
    import difflib

    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
