"""SIGTERM and Ctrl-C: noted instead of died of, and agreed on by all processes."""

import signal

import jax
from jax.sharding import Mesh

from lens_jax import parallel


class StopSignals:
    """Notes a signal, so that the step in progress ends and is saved. For use as a context."""

    def __init__(self, mesh: Mesh | None = None):
        self._mesh, self._received = mesh, None
        self._vote: jax.Array | None = None

    def agreed(self) -> signal.Signals | None:
        """The signal that all processes act on after this step; called once a step by all of them.

        Processes are told at different moments. So each gives what it has received to a sum over all, and acts on
        that of the step before, which needs no waiting: the same one everywhere.
        """
        if jax.process_count() == 1:
            return self._received
        before, self._vote = self._vote, parallel.largest(self._received or 0, self._mesh)
        number = 0 if before is None else int(before)
        return signal.Signals(number) if number else None

    def __enter__(self) -> "StopSignals":
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self._received is not None:
            # Asked twice: the user does not want to wait for the save.
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
