"""English nouns with articles and numbers, for those that pictograms have."""

from collections.abc import Sequence

NUMBERS = {2: "two", 3: "three", 4: "four"}
# Names that are plural already, and those of what is not counted.
PLURAL = {"grapes", "cherries", "pancakes", "scissors", "french fries"}
UNCOUNTED = {"bread", "popcorn", "ice", "broccoli", "fire"}
IRREGULAR = {
    "mouse": "mice", "fish": "fish", "ear of corn": "ears of corn", "octopus": "octopuses", "tooth": "teeth",
    "maple leaf": "maple leaves",
}  # fmt: skip


def one(name: str) -> str:
    """The noun with an indefinite article, where it takes one."""
    noun = name.removeprefix("small ").removeprefix("large ")
    if noun in PLURAL or noun in UNCOUNTED:
        return name
    # By sound, as far as our names go: "a unicorn", "a eucalyptus", but "an umbrella".
    return f"an {name}" if name[0] in "aeiou" and not name.startswith(("uni", "eu", "one")) else f"a {name}"


def several(name: str, count: int) -> str:
    """ "two foxes"; what is not counted as "two times bread"."""
    number = NUMBERS[count]
    if name in UNCOUNTED or name in PLURAL:
        return f"{number} times {name}"
    return f"{number} {plural(name)}"


def plural(name: str) -> str:
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith(("s", "x", "z", "ch", "sh")) or name in ("potato", "tomato", "mango"):
        return name + "es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def listed(things: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
