"""The stage graph: it follows from declared inputs and outputs and is written down nowhere else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter

from pipeline.errors import UserError
from pipeline.workflow.declaration import Arity, Catalog, Input, StageDeclaration, StageSettings


@dataclass(frozen=True)
class Node:
    """A stage of a workflow; `inputs` maps each input's name to the stages behind it, in workflow order."""

    name: str
    declaration: StageDeclaration
    stage: StageSettings
    inputs: Mapping[str, tuple[str, ...]]

    @property
    def upstream(self) -> Iterator[str]:
        """Names of the stages that this one waits for."""
        return (name for names in self.inputs.values() for name in names)


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which every stage follows its inputs."""

    nodes: tuple[Node, ...]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def node(self, name: str) -> Node:
        """The node of that name."""
        return next(node for node in self.nodes if node.name == name)


def declaration_of(name: str, kind: str, catalog: Catalog) -> StageDeclaration:
    """The declaration behind `stage.<name>.kind`, or a `UserError` that lists the valid kinds."""
    if kind not in catalog.stages:
        close = get_close_matches(kind, catalog.stages, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"stage.{name}.kind={kind!r} is no stage; {hint}valid kinds are {', '.join(sorted(catalog.stages))}"
        )
    return catalog.stages[kind]


def build_graph(stages: Mapping[str, StageSettings], catalog: Catalog) -> Graph:
    """Connect stages by the names of their inputs and outputs.

    Raises `UserError` for two producers of an output that may have one, for a missing producer, and for a cycle.
    """
    declarations = {name: declaration_of(name, stage.kind, catalog) for name, stage in stages.items()}
    producers: dict[str, list[str]] = {}
    for name, declaration in declarations.items():
        producers.setdefault(declaration.output, []).append(name)
    for output, names in producers.items():
        if len(names) > 1 and not declarations[names[0]].repeatable:
            raise UserError(
                f"stages {' and '.join(names)} both produce {output!r}; a workflow has one producer of it: remove one"
            )
    nodes = {
        name: Node(
            name=name,
            declaration=declaration,
            stage=stages[name],
            inputs={each.name: _producers_of(name, each, producers) for each in declaration.inputs},
        )
        for name, declaration in declarations.items()
    }
    return Graph(tuple(nodes[name] for name in _ordered(nodes)))


def _ordered(nodes: Mapping[str, Node]) -> Iterator[str]:
    """The order in which the config names the stages, but each one right after those it waits for."""
    try:
        TopologicalSorter({name: list(node.upstream) for name, node in nodes.items()}).prepare()
    except CycleError as error:
        raise UserError(f"the stages form a cycle: {' -> '.join(error.args[1])}; break one of these inputs") from error
    given: set[str] = set()

    def with_its_inputs(name: str) -> Iterator[str]:
        if name in given:
            return
        given.add(name)
        for needed in nodes[name].upstream:
            yield from with_its_inputs(needed)
        yield name

    for name in nodes:
        yield from with_its_inputs(name)


def _producers_of(stage: str, needed: Input, producers: Mapping[str, list[str]]) -> tuple[str, ...]:
    found = tuple(producers.get(needed.name, ()))
    if needed.arity is Arity.ONE and not found:
        raise UserError(
            f"stage {stage} needs {needed.name!r}, which no stage of this workflow produces; "
            f"add one (produced here: {', '.join(sorted(producers))})"
        )
    if needed.arity is not Arity.ANY and len(found) > 1:
        raise UserError(f"stage {stage} takes one {needed.name!r}, and {', '.join(found)} produce it: remove one")
    return found
