"""A profiler trace of some steps of a run."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from lens_jax.run.config import ProfileConfig
from lens_jax.run.plain_path import plain


class Profile:
    """A trace of the steps [start, start + steps), written by process 0 into the folder `profile` of the run.

    All processes know when it ends, so that they do the same after that step; only the first one traces.
    """

    def __init__(self, config: ProfileConfig, out: Path, say: Callable[[str], None]):
        self._steps = range(config.start, config.start + config.steps)
        self._writes = jax.process_index() == 0
        self._folder, self._say = out / "profile", say
        self._traced: list[int] = []
        self._wrote = False

    def begin(self, step: int) -> None:
        """Before a step: start the trace if the window has been reached. A resumed run may enter it in the middle."""
        if step not in self._steps:
            return
        if not self._traced and self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            # JAX looks for its own files by a pattern.
            jax.profiler.start_trace(plain(epath.Path(self._folder.absolute())), create_perfetto_trace=True)
        self._traced.append(step)

    def ends(self, step: int) -> bool:
        """Whether a step is the last of the trace."""
        return bool(self._traced) and step == self._steps[-1]

    def end(self, step: int) -> None:
        """After a step has finished on the device: write the trace if it was the last one."""
        if self.ends(step):
            self._write()

    def close(self) -> None:
        """Write what there is when the run stops inside the window; its own failure must not hide the run's."""
        with contextlib.suppress(RuntimeError, OSError):
            if self._traced:
                self._write()
        if self._steps and not self._wrote:
            self._say(f"nothing traced: none of the steps {self._steps[0]} to {self._steps[-1]} was taken here")

    def _write(self) -> None:
        first, last = self._traced[0], self._traced[-1]
        self._traced, self._wrote = [], True
        if not self._writes:
            return
        jax.profiler.stop_trace()
        self._say(
            f"steps {first} to {last} traced in {self._folder}: open its perfetto_trace.json.gz at ui.perfetto.dev, "
            f"or pip install xprof and run xprof --logdir {self._folder}"
        )
