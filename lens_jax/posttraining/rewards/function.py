"""A reward that a user wrote: any python function of images and prompts."""

import dataclasses
import importlib
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lens_jax.errors import LensError
from lens_jax.posttraining.prompts.prompt import Prompt
from lens_jax.posttraining.rewards.reward import Score


@dataclasses.dataclass(frozen=True)
class Function:
    """A python function `f(images, prompts)` that gives a value an image."""

    # Where it is: "package.module:function", from the folder of the command or what is installed.
    function: str = ""
    # Of the reward, in logs.
    name: str = "function"

    def load(self) -> "FunctionReward":
        return FunctionReward(self.name, self.function, _find(self.function))


class FunctionReward:
    """Calls it with uint8 images [H, W, 3] and `Prompt`s; it gives a sequence with a value an image.

    A value is a number, a mapping of name to number in which the reward's own name is the reward, a `Score`, or None
    where there is none. A number that is not finite counts as none. What it raises ends the run: it is a program that
    is wrong, not an image.
    """

    def __init__(self, name: str, where: str, function: Callable[[Sequence[np.ndarray], Sequence[Prompt]], Any]):
        self.name = name
        self._where = where
        self._function = function

    def check(self) -> None:
        """It was found when it was loaded."""

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Score]:
        try:
            values = list(self._function(images, prompts))
        except Exception as error:
            line = " ".join(str(error).split())
            raise LensError(f"reward {self._where}: {type(error).__name__}: {line:.200}") from error
        if len(values) != len(images):
            raise LensError(f"reward {self._where} gave {len(values)} values for {len(images)} images")
        return [self._score(value) for value in values]

    def close(self) -> None:
        """Nothing is held."""

    def _score(self, value: Any) -> Score:
        if isinstance(value, Score):
            return value
        if value is None:
            return Score(error=f"{self._where} gave None")
        named = value if isinstance(value, Mapping) else {self.name: value}
        if not all(isinstance(number, numbers.Real | np.ndarray) and np.ndim(number) == 0 for number in named.values()):
            raise LensError(f"reward {self._where} gave {value!r:.60}; expected a number, a mapping of them, or None")
        own = lambda name: name if name == self.name else f"{self.name}/{name}"
        finite = {own(name): float(number) for name, number in named.items() if math.isfinite(number)}
        return Score(finite, None if self.name in finite else f"{self._where} gave no finite {self.name!r}")


def _find(path: str) -> Callable:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise LensError(f"reward function is {path!r}; expected package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module is a program: whatever it raises is the user's to see
        raise LensError(f"reward function {path}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise LensError(f"reward function {path}: {type(found).__name__} is no function")
    return found
