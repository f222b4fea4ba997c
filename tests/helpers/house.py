"""The rooms of the house, the arrows between them and its circles, read from the folders and their imports.

    python tests/helpers/house.py             # prints rooms, arrows, climbs and circles
    python tests/helpers/house.py --write     # and brings the tree in docs/ARCHITECTURE.md up to date

The exit status is 1 if there is a climb or a circle.

A room is a file or a folder directly inside nbhelpers/. Its floor stands in docs/ARCHITECTURE.md: a room imports only
rooms from floors below its own, wherever in a file the import stands. Nothing is imported to find out.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nbhelpers"
PAGE = ROOT / "docs" / "ARCHITECTURE.md"


def rooms() -> list[str]:
    """Names of the package's rooms, its front door left out."""
    folders = [path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))]
    return sorted([*folders, *(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")])


def floors() -> list[list[str]]:
    """The rooms floor by floor, the top first, as docs/ARCHITECTURE.md has them."""
    lines = re.findall(r"^\| *\d+ *\|([^|]*)\|", PAGE.read_text(), re.M)
    return [re.findall(r"`(\w+)`", line) for line in lines]


def module_of(file: Path, folder: Path) -> str:
    """nbhelpers/kernels/triton/rope.py -> nbhelpers.kernels.triton.rope; a folder's __init__.py is the folder."""
    parts = [folder.name, *file.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, folder: Path) -> set[str]:
    """Dotted names that a file of `folder` imports from it: of modules, or of names inside them."""
    package = [folder.name, *file.relative_to(folder).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in found if name.startswith(f"{folder.name}.")}


def files_graph(folder: Path) -> dict[str, set[str]]:
    """Which modules each module of a folder imports."""
    files = {module_of(file, folder): file for file in folder.rglob("*.py")}

    def there(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    graph = {}
    for name, file in files.items():
        graph[name] = {other for imported in imports_of(file, folder) if (other := there(imported))} - {name}
    graph.pop(folder.name, None)  # the lazy front door names everything
    return graph


def rooms_graph() -> dict[str, set[str]]:
    """Which rooms each room imports: the arrows."""
    known, graph = set(rooms()), {room: set() for room in rooms()}
    for module, others in files_graph(PACKAGE).items():
        own = module.split(".")[1]
        graph[own] |= {name.split(".")[1] for name in others if "." in name} & known - {own}
    return graph


def climbs() -> list[str]:
    """A sentence for each file that imports a room of its own floor or of one above."""
    floor = {room: number for number, row in enumerate(reversed(floors())) for room in row}
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        own = module_of(file, PACKAGE).split(".")[1:2]
        if not own:  # the front door
            continue
        targets = {name.split(".")[1] for name in imports_of(file, PACKAGE)} & floor.keys() - set(own)
        found += [
            f"{file.relative_to(PACKAGE)} imports {room}, a room above its own"
            for room in sorted(targets)
            if floor[room] >= floor[own[0]]
        ]
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every group of nodes that reach each other (Tarjan 1972), sorted."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return sorted(found)


def tree(folder: Path, indent: int = 2) -> list[str]:
    """A line for each Python file below a folder: its name and the first line of its docstring."""
    lines = [f"{' ' * (indent - 2)}{folder.name}/"]
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and any(path.rglob("*.py")):
            lines += tree(path, indent + 2)
        elif path.suffix == ".py" and (text := path.read_text()):  # an empty __init__.py says nothing
            first = (ast.get_docstring(ast.parse(text)) or "?").splitlines()[0].rstrip(".")
            lines.append(f"{' ' * indent}{path.name:<22} {first}")
    return lines


def page() -> str:
    """docs/ARCHITECTURE.md with its tree as the folders are now."""
    lines = [*tree(PACKAGE), *tree(ROOT / "benchmarks")]
    return re.sub(
        r"(?<=^```tree\n).*?(?=^```$)", lambda _: "\n".join(lines) + "\n", PAGE.read_text(), flags=re.M | re.S
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    graph = rooms_graph()
    for room, others in graph.items():
        print(f"{room} -> {', '.join(sorted(others)) or '(nothing)'}")
    round_trips = circles(graph) + [c for f in ("nbhelpers", "benchmarks") for c in circles(files_graph(ROOT / f))]
    print(f"{len(graph)} rooms, {sum(map(len, graph.values()))} arrows, {len(round_trips)} circles")
    for sentence in climbs() + [f"a circle: {' -> '.join(circle)}" for circle in round_trips]:
        print(sentence)
    sys.exit(bool(climbs() or round_trips))
