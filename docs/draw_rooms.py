"""Draws the imports between the rooms of the package, as the code has them: docs/images/rooms.svg.

`python docs/draw_rooms.py` after a room was added or an import between two rooms. A room stands above all that it
imports; lines that follow from others (a → c where a → b → c) are left out. Which imports are allowed is the table in
tests/unit/test_packaging.py. Exits with an error if the imports have a cycle.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("engine", "kernels", "launch", "benchmarks")
WHOLE = ("benchmarks",)  # drawn as one
WIDTH, HEIGHT, GAP_X, GAP_Y = 168, 40, 26, 46


def room_of(path: Path) -> str:
    """engine/optim/optimizer.py → engine/optim; files directly in a top-level folder belong to it."""
    return room_at(list(path.relative_to(ROOT).parts[:-1]))


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, type checking aside."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        for alias in node.names:
            if isinstance(node, ast.Import):
                parts = alias.name.split(".")
            elif node.level:
                base = path.relative_to(ROOT).parts[: -node.level]
                parts = ["hdpissa", *base, *(node.module or "").split("."), alias.name]
            else:
                parts = [*(node.module or "").split("."), alias.name]
            if parts[0] == "hdpissa":
                found.add(room_at([part for part in parts[1:] if part]))
    return found - {room_of(path), ""}


def room_at(parts: list[str]) -> str:
    """The room of a dotted name: the longest folder in it, at most two deep."""
    folders = [part for i, part in enumerate(parts[:2]) if (ROOT / "/".join(parts[: i + 1])).is_dir()]
    if not folders or folders[0] not in TOPS:
        return ""
    return folders[0] if folders[0] in WHOLE else "/".join(folders)


def graph() -> tuple[dict[str, set[str]], dict[str, int]]:
    """Room → rooms that it imports, and room → lines."""
    uses: dict[str, set[str]] = {}
    lines: dict[str, int] = {}
    for path in sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py")):
        room = room_of(path)
        uses.setdefault(room, set())
        lines[room] = lines.get(room, 0) + path.read_text().count("\n")
        if path.name != "__init__.py":  # a package's own file only passes public names on
            uses[room] |= imported(path)
    # errors, precision and consensus, directly in engine/, are for every room; the engine's own rooms are below it.
    for room in uses:
        if room.startswith("engine/"):
            uses[room].discard("engine")
    return uses, lines


def floors(uses: dict[str, set[str]]) -> dict[str, int]:
    """Each room one above the highest that it imports."""
    level: dict[str, int] = {}
    for room in TopologicalSorter(uses).static_order():
        level[room] = 1 + max((level[other] for other in uses[room]), default=-1)
    return level


def reaches(uses: dict[str, set[str]], start: str, goal: str) -> bool:
    return goal in uses[start] or any(reaches(uses, other, goal) for other in uses[start])


def svg(uses: dict[str, set[str]], lines: dict[str, int]) -> str:
    level = floors(uses)
    rows = [sorted(room for room in uses if level[room] == i) for i in reversed(range(max(level.values()) + 1))]
    widest = max(len(row) for row in rows) * (WIDTH + GAP_X)
    place = {}
    for y, row in enumerate(rows):
        left = (widest - len(row) * (WIDTH + GAP_X)) / 2
        place |= {
            room: (left + x * (WIDTH + GAP_X) + GAP_X / 2, y * (HEIGHT + GAP_Y) + 10) for x, room in enumerate(row)
        }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest} {len(rows) * (HEIGHT + GAP_Y)}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for room, others in sorted(uses.items()):
        for other in sorted(others):
            if not any(reaches(uses, between, other) for between in others - {other}):
                (x1, y1), (x2, y2) = place[room], place[other]
                ends = f"M{x1 + WIDTH / 2:.0f} {y1 + HEIGHT:.0f} L{x2 + WIDTH / 2:.0f} {y2:.0f}"
                parts.append(f'<path d="{ends}" stroke="#8a94a6"/>')
    for room, (x, y) in place.items():
        parts += [
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3fb" stroke="#4a6fa5"/>',
            f'<text x="{x + WIDTH / 2:.0f}" y="{y + 17:.0f}" text-anchor="middle">{room}</text>',
            f'<text x="{x + WIDTH / 2:.0f}" y="{y + 33:.0f}" text-anchor="middle" fill="#667" font-size="11">'
            f"{lines[room]:,} lines</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = ROOT / "docs" / "images" / "rooms.svg"
    target.write_text(svg(*graph()))
    print(target.relative_to(ROOT))
