"""The graph of shared stages: stages that the same runs share stand in one box, and boxes follow each other.

A stage's inputs serve at least the runs that it serves itself, so boxes of runs form a graph without cycles.
"""

from dataclasses import dataclass, replace
from functools import cache

from pipeline.report.records import Comparison, StageReport

BOX_WIDTH = 250
COLUMN_GAP = 70
ROW_GAP = 18
LINE = 22
HEAD = 30
PADDING = 10
MARGIN = 8
_Users = tuple[str, ...]


@dataclass(frozen=True)
class Box:
    """Stages that the same runs share; places in pixels of the drawing."""

    users: tuple[str, ...]
    stages: tuple[StageReport, ...]
    left: int
    top: int

    @property
    def height(self) -> int:
        """In pixels."""
        return HEAD + LINE * len(self.stages) + PADDING

    @property
    def middle(self) -> int:
        """Where edges meet it."""
        return self.top + self.height // 2

    @property
    def right(self) -> int:
        """Its right side."""
        return self.left + BOX_WIDTH


@dataclass(frozen=True)
class Graph:
    """Boxes and the edges between them (from, to), with the drawing's size in pixels."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[Box, Box], ...]
    width: int
    height: int


def sharing_graph(comparison: Comparison) -> Graph:
    """Boxes in columns, what is shared by most to the left; each near the rows of its runs."""
    groups: dict[_Users, list[StageReport]] = {}
    for stage in comparison.distinct_stages:
        groups.setdefault(comparison.users[stage.fingerprint], []).append(stage)
    inputs = _without_shortcuts({users: _inputs(comparison, users, stages) for users, stages in groups.items()})
    columns = _columns(inputs)
    order = {run.name: number for number, run in enumerate(comparison.runs)}

    def row(users: _Users) -> float:
        return sum(order[name] for name in users) / len(users)

    boxes: dict[_Users, Box] = {}
    bottoms: dict[int, int] = {}
    for users in sorted(groups, key=lambda each: (columns[each], row(each))):
        column = columns[users]
        top = bottoms.get(column, MARGIN)
        boxes[users] = Box(users, tuple(groups[users]), MARGIN + column * (BOX_WIDTH + COLUMN_GAP), top)
        bottoms[column] = top + boxes[users].height + ROW_GAP
    height = max(bottoms.values(), default=MARGIN) - ROW_GAP
    centred = {
        users: replace(box, top=box.top + (height - (bottoms[columns[users]] - ROW_GAP)) // 2)
        for users, box in boxes.items()
    }
    edges = [(centred[source], centred[users]) for users, sources in inputs.items() for source in sources]
    width = max((box.right for box in boxes.values()), default=0) + MARGIN
    return Graph(tuple(centred.values()), tuple(edges), width, height + MARGIN)


def _inputs(comparison: Comparison, users: _Users, stages: list[StageReport]) -> list[_Users]:
    """The other boxes that a box takes something from."""
    run = next(run for run in comparison.runs if run.name == users[0])
    found: dict[_Users, None] = {}
    for stage in stages:
        for name in stage.upstream:
            source = run.stage(name)
            if source is not None and comparison.users[source.fingerprint] != users:
                found[comparison.users[source.fingerprint]] = None
    return list(found)


def _without_shortcuts(inputs: dict[_Users, list[_Users]]) -> dict[_Users, list[_Users]]:
    """Leave out an input that another input was built on: its line says nothing new."""

    def reaches(source: _Users, users: _Users) -> bool:
        return source in inputs[users] or any(reaches(source, between) for between in inputs[users])

    return {
        users: [each for each in sources if not any(reaches(each, other) for other in sources if other != each)]
        for users, sources in inputs.items()
    }


def _columns(inputs: dict[_Users, list[_Users]]) -> dict[_Users, int]:
    """The longest way to each box."""

    @cache
    def column(users: _Users) -> int:
        return 1 + max((column(source) for source in inputs[users]), default=-1)

    return {users: column(users) for users in inputs}
