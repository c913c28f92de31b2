"""The house: imports point to the floors below, never up, never in a circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = dict(kernels=1, common=1, data=2, engine=3, baselines=4, studies=6)
METHODS = 5  # the scripts


def modules() -> dict[str, Path]:
    """Every module of the project by its name, tests left out: they see all floors."""
    files = [*ROOT.glob("*.py")]
    files += [file for folder in FLOORS for file in (ROOT / folder).rglob("*.py")]
    named = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imports(name: str, text: str, known) -> set[str]:
    """Which of the `known` modules a module's text imports, wherever in it."""
    package = name if (ROOT / name / "__init__.py").exists() else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folders = package.split(".")
            above = folders[: len(folders) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules_of_it = {f"{base}.{alias.name}" for alias in node.names} & set(known)
            found |= modules_of_it or {base}
    return found & set(known) - {name}


def floor(name: str) -> int:
    return FLOORS.get(name.partition(".")[0], METHODS)


@cache
def house() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, file.read_text(), known) for name, file in known.items()}


def wrong_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports that point up, between method scripts, or between common and kernels."""

    def wrong(name: str, other: str) -> bool:
        if floor(name) != floor(other):
            return floor(other) > floor(name)
        packages = {name.partition(".")[0], other.partition(".")[0]}
        return floor(name) in (1, METHODS) and len(packages) == 2

    return [
        f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        for name, others in graph.items()
        for other in others
        if wrong(name, other)
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, or none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := walk(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in graph)), [])


def test_imports_point_down():
    assert {"common", "d2det", "data.coco", "engine.train", "baselines.gfl"} <= house().keys()
    assert "common" in house()["engine.train"] and "kernels" in house()["d2det"]
    assert not house()["common"]
    assert not wrong_imports(house())


def test_imports_make_no_circle():
    assert not circle(house())


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("common", "import engine", "common (floor 1) imports engine (floor 3)"),
        ("common", "from kernels import nms", "common (floor 1) imports kernels"),
        ("kernels.nms", "from common import match", "kernels.nms (floor 1) imports common"),
        ("data.coco", "from engine import Run", "data.coco (floor 2) imports engine (floor 3)"),
        ("engine.predict", "def f():\n    import d2det", "engine.predict (floor 3) imports d2det"),
        ("d2det", "from double_head import FCHead", "d2det (floor 5) imports double_head"),
        ("baselines.retinanet", "from studies import bench", "imports studies.bench (floor 6)"),
    ],
)
def test_an_import_up_or_sideways_is_seen(name, text, message):
    graph = {**house(), name: imports(name, text, modules())}
    assert any(message in wrong for wrong in wrong_imports(graph))


def test_a_circle_is_seen():
    text = "import engine"  # the package imports this very file
    graph = {**house(), "engine.train": imports("engine.train", text, modules())}
    assert "engine" in circle(graph) and "engine.train" in circle(graph)
    assert imports("kernels", "from .nms import nms\nfrom . import bench", modules()) == {
        "kernels.nms",
        "kernels.bench",
    }
    assert imports("kernels.bench", "from .nms import nms", modules()) == {"kernels.nms"}
