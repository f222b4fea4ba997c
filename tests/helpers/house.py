"""The rooms of the house, the arrows between them and its circles, read from the folders and their imports.

    python tests/helpers/house.py     # prints rooms and arrows, climbs and circles: exit status 1 if there are any

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


def files_in_the_folders() -> list[str]:
    """Every Python file of package and benchmarks, as paths from the root; an empty __init__.py is no file to name."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    return sorted(str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py" or file.read_text())


def files_on_the_page() -> list[str]:
    """The files that the trees of docs/ARCHITECTURE.md name. A line is `name  what it is`, below its folder."""
    found = []
    for block in re.findall(r"^```tree\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        path: list[tuple[int, str]] = []
        for line in block.splitlines():
            if not (match := re.match(r"( *)([\w/]+(?:\.py)?/?)(?: |$)", line)):
                continue
            indent, name = len(match[1]), match[2]
            while path and path[-1][0] >= indent:
                path.pop()
            if name.endswith("/"):
                path.append((indent, name))
            elif name.endswith(".py"):
                found.append("".join(folder for _, folder in path) + name)
    return sorted(found)


if __name__ == "__main__":
    graph = rooms_graph()
    for room, others in graph.items():
        print(f"{room} -> {', '.join(sorted(others)) or '(nothing)'}")
    round_trips = circles(graph) + [c for f in ("nbhelpers", "benchmarks") for c in circles(files_graph(ROOT / f))]
    print(f"{len(graph)} rooms, {sum(map(len, graph.values()))} arrows, {len(round_trips)} circles")
    for sentence in climbs() + [f"a circle: {' -> '.join(circle)}" for circle in round_trips]:
        print(sentence)
    sys.exit(bool(climbs() or round_trips))
