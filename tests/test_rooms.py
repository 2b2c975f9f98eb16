"""The order of the rooms: no module imports one of a room above its own, at its top or inside a function."""

import ast
from pathlib import Path

import lens_jax

# From the lowest. Rooms in one line may not import each other either; what is not listed is a file at the top level.
ORDER = (
    (
        "errors",
        "usage",
    ),
    ("console", "atomic", "environment", "config", "contact_sheet"),
    ("llm", "models"),
    ("flops",),
    ("parallel",),
    ("convert",),
    ("data",),
    ("checker",),
    ("encoders",),
    ("diffusion",),
    ("reasoner",),
    ("run",),
    ("pretraining",),
    ("posttraining",),
    ("inference",),
    ("evaluation", "planning", "plot", "info"),
    ("bench",),
    ("cli", "configs"),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LEVEL["__init__"] = -1  # what is imported of the package itself is its version
ROOT = Path(lens_jax.__file__).parent
# The configs that come with the package are found by their names.
ALLOWED = {("config", "configs")}


def modules():
    """(room, file) of every module, those of convert/ and configs/ too; a command is of the highest."""
    roots = {"": ROOT, "convert": ROOT.parent / "convert", "configs": ROOT.parent / "configs"}
    for room, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            command = room == "convert" and path.name == "command.py"
            yield "cli" if command else room or path.relative_to(root).parts[0].removesuffix(".py"), path


def imported(path: Path):
    """(line, room) of every import of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lens_jax":
            inside = node.module.split(".")[1:]
            names = [inside[0]] if inside else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lens_jax.")]
        for name in names:
            yield node.lineno, name if name in LEVEL else "__init__"


def test_no_arrow_goes_up():
    wrong = []
    for room, path in modules():
        for line, other in imported(path):
            below = LEVEL[other] < LEVEL[room] or other == room
            if not below and (room, other) not in ALLOWED and room != "__init__":
                wrong.append(f"{path.relative_to(ROOT.parent)}:{line}: {room} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_order():
    assert {room for room, _ in modules()} <= LEVEL.keys()


def test_the_loop_knows_no_task():
    """`run` imports nothing of what is trained: neither the networks nor the data."""
    for room, path in modules():
        if room == "run":
            assert {other for _, other in imported(path)} <= {"run", "parallel", "errors", "console", "atomic"}, path
