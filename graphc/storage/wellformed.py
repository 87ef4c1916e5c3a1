"""Whether the graphs of an ``onnx.ModelProto`` are well-formed: names, order, operators.

``onnx.checker`` asks much of the same, but ends at 2 GiB, stops at external data and does not say which node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from graphc.errors import BadInput, nearest
from graphc.storage.container import describe

_STANDARD = ("", "ai.onnx")

_NEWEST = 10_000
"""A version beyond every opset."""


def check(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse a model whose graphs are not well-formed, and sort nodes that are merely out of order.

    Raises:
        BadInput: The message names the node or value and says what to do.
    """
    _Check(proto, path).run()


class _Check:
    def __init__(self, proto: onnx.ModelProto, path: Path) -> None:
        self.proto, self.path = proto, path
        self.functions = {(f.domain, f.name, f.overload): f for f in proto.functions}

    def fail(self, what: str, place: str = "", why: str = "", hint: str = "") -> BadInput:
        where = f"{self.path}, {place}" if place else str(self.path)
        return BadInput(what, where=where, why=why, hint=hint or "export the model again")

    def text(self, place: str, *names: object) -> None:
        """Refuse names that are no UTF-8, which protobuf gives as bytes."""
        for name in names:
            if not isinstance(name, str):
                raise self.fail(f"a name is not valid UTF-8: {name!r}", place, why="the file is damaged")

    def run(self) -> None:
        proto = self.proto
        self.text("", proto.producer_name, proto.producer_version, proto.domain, proto.doc_string)
        self.text("", *(text for entry in proto.metadata_props for text in (entry.key, entry.value)))
        imports = self.imports(proto.opset_import, "")
        if not self.proto.graph.output:
            raise self.fail("the model has no outputs")
        self.graph(self.proto.graph, [], imports)
        for function in self.proto.functions:
            place = f"function '{function.name}'"
            self.text(place, function.name, function.domain, function.overload, function.doc_string)
            self.text(place, *function.input, *function.output, *function.attribute)
            known = dict.fromkeys(function.input, place)
            self.body(function, [known], self.imports(function.opset_import, place), place)
            for name in function.output:
                if name not in known:
                    raise self.fail(f"nothing makes the output '{name}'", place)
        self.recursion()

    def imports(self, declared: Any, place: str) -> dict[str, int]:
        """Opset versions by domain; the standard one is renamed to its short name."""
        found: dict[str, int] = {}
        for each in declared:
            self.text(place, each.domain)
            if each.domain == "ai.onnx":
                each.domain = ""
            if found.setdefault(each.domain, each.version) != each.version:
                raise self.fail(f"two versions of the opset '{each.domain or 'ai.onnx'}' are imported", place)
        if not found:
            raise self.fail(
                "the model says no opset version", place, hint="set opset_import, or export the model again"
            )
        newest = onnx.defs.onnx_opset_version()
        if found.get("", 1) > newest:
            raise self.fail(
                f"opset {found['']} is too new",
                place,
                why=f"the installed onnx {onnx.__version__} knows opsets up to {newest}",
                hint=f"pip install --upgrade onnx, or export the model with opset {newest} or lower",
            )
        return found

    def graph(self, graph: Any, outer: list[dict[str, str]], imports: Mapping[str, int]) -> None:
        place = f"graph '{graph.name}'" if outer else ""
        known: dict[str, str] = {}
        values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        self.text(place, graph.name, graph.doc_string, *(value.name for value in values))
        for value in (*graph.input, *graph.output, *graph.value_info):
            dims = value.type.tensor_type.shape.dim
            self.text(place, value.doc_string, value.type.denotation, *(dim.dim_param for dim in dims))
            self.text(place, *(dim.denotation for dim in dims))
        for value in graph.input:
            if value.name in known or not value.name:
                raise self.fail(f"two inputs are called '{value.name}'", place)
            known[value.name] = "an input"
        constants = Counter(t.name for t in graph.initializer)
        for name, count in constants.items():
            if count > 1 or not name:
                raise self.fail(f"{count} initializers are called '{name}'", place)
            known.setdefault(name, "an initializer")
        if graph.sparse_initializer:
            raise self.fail(
                "the model has sparse initializers",
                place,
                why="graphc does not read them",
                hint="make them dense: every runtime does when it loads them",
            )
        self.body(graph, [*outer, known], imports, place)
        for value in graph.output:
            if value.name not in known:
                known_outside = any(value.name in scope for scope in outer)
                raise self.fail(
                    f"nothing makes the output '{value.name}'" + (" in the subgraph" if known_outside else ""),
                    place,
                    why="a value of the outer graph needs an Identity node" if known_outside else "",
                    hint=nearest(value.name, known) if not known_outside else "",
                )

    def body(self, graph: Any, scopes: list[dict[str, str]], imports: Mapping[str, int], place: str) -> None:
        """Check the nodes of a graph or function; ``scopes[-1]`` gets what they make."""
        made: dict[str, str] = {}
        for node in graph.node:
            self.node(node, imports)
            for name in filter(None, node.output):
                for scope in (*scopes, made):
                    if name in scope:
                        raise self.fail(
                            f"the value '{name}' is made twice", describe(node), why=f"it is also {scope[name]}"
                        )
                made[name] = f"made by {describe(node)}"
        self.sort(graph, scopes, place)
        for node in graph.node:
            for body in _bodies(node):
                self.graph(body, scopes, imports)
            scopes[-1].update((name, made[name]) for name in node.output if name)

    def sort(self, graph: Any, scopes: Sequence[Mapping[str, str]], place: str) -> None:
        """Put nodes after what they read; the order stays where it is right already."""
        makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
        waiting: list[set[int]] = []
        in_order = True
        for i, node in enumerate(graph.node):
            reads = set()
            for name in _reads(node):
                maker = makers.get(name)
                if maker is not None:
                    reads.add(maker)
                    in_order = in_order and maker < i
                elif name in node.input and not any(name in scope for scope in scopes):
                    known = [k for scope in (*scopes, makers) for k in scope]
                    raise self.fail(
                        f"the value '{name}' does not exist",
                        describe(node),
                        why="a node reads it, and no node, input or initializer makes it",
                        hint=nearest(name, known) if len(known) < 50_000 else "",
                    )
            waiting.append(reads)
        if in_order:
            return
        order = _order(waiting)
        if len(order) < len(waiting):
            stuck = _cycle(waiting, set(range(len(waiting))) - set(order))
            raise self.fail(
                "the graph has a cycle",
                place,
                why=" -> ".join(describe(graph.node[i]) for i in stuck),
            )
        nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
        del graph.node[:]
        graph.node.extend(nodes)

    def node(self, node: Any, imports: Mapping[str, int]) -> None:
        names = (node.name, node.op_type, node.domain, node.overload, node.doc_string, *node.input, *node.output)
        self.text(describe(node), *names)
        for attr in node.attribute:
            self.text(describe(node), attr.name, attr.ref_attr_name, attr.doc_string)
            if not attr.type:
                raise self.fail(f"attribute '{attr.name}' has no type", describe(node))
        if node.domain not in imports and node.domain not in _STANDARD:
            raise self.fail(
                f"the domain '{node.domain}' is used but not imported",
                describe(node),
                hint="add it to opset_import, or export the model again",
            )
        if (node.domain, node.op_type, node.overload) in self.functions:
            return
        domain = "" if node.domain in _STANDARD else node.domain
        schema = _schema(node.op_type, domain, imports.get(domain, 1))
        if schema is None:
            if domain in _checked_domains():
                raise self.unknown(node, domain, imports.get(domain, 1))
            return
        if schema.deprecated and _schema(node.op_type, domain, _NEWEST).deprecated:
            raise self.fail(
                f"the operator {node.op_type} does not exist in opset {imports.get(domain, 1)}",
                describe(node),
                why=f"it was removed in opset {schema.since_version}",
            )
        self.arity(node, schema)
        self.attributes(node, schema)

    def unknown(self, node: Any, domain: str, version: int) -> BadInput:
        newer = _schema(node.op_type, domain, _NEWEST)
        if newer is not None:
            return self.fail(
                f"the operator {node.op_type} does not exist in opset {version}",
                describe(node),
                why=f"it came with opset {newer.since_version}",
                hint=f"export the model with opset {newer.since_version} or higher",
            )
        known = {s.name for s in onnx.defs.get_all_schemas() if s.domain == domain}
        return self.fail(
            f"there is no operator {node.op_type} in {domain or 'ai.onnx'}",
            describe(node),
            why="operators of one's own belong to a domain of their own",
            hint=nearest(node.op_type, known) if _close(node.op_type, known) else "give the node its own domain",
        )

    def arity(self, node: Any, schema: Any) -> None:
        count = len(node.input)
        if not schema.min_input <= count <= schema.max_input:
            most = "any number" if schema.max_input > 1000 else str(schema.max_input)
            takes = most if schema.min_input == schema.max_input else f"{schema.min_input} to {most}"
            raise self.fail(
                f"{node.op_type} has {count} inputs and takes {takes}", describe(node), hint=_documented(node)
            )
        single = onnx.defs.OpSchema.FormalParameterOption.Single
        for given, declared in zip(node.input, schema.inputs, strict=False):
            if not given and declared.option == single:
                raise self.fail(
                    f"{node.op_type} lacks its input '{declared.name}'", describe(node), hint=_documented(node)
                )
        if len(node.output) > schema.max_output:
            raise self.fail(
                f"{node.op_type} has {len(node.output)} outputs and gives at most {schema.max_output}",
                describe(node),
                hint=_documented(node),
            )

    def attributes(self, node: Any, schema: Any) -> None:
        given = {attr.name: attr for attr in node.attribute}
        for name, attr in given.items():
            declared = schema.attributes.get(name)
            if declared is None:
                raise self.fail(
                    f"{node.op_type} has no attribute '{name}' in opset {schema.since_version}",
                    describe(node),
                    hint=nearest(name, schema.attributes),
                )
            if attr.type and int(attr.type) != int(declared.type.value):
                kind = onnx.AttributeProto.AttributeType.Name(attr.type)
                raise self.fail(
                    f"attribute '{name}' of {node.op_type} is {kind} and should be {declared.type.name}",
                    describe(node),
                )
        for name, declared in schema.attributes.items():
            if declared.required and name not in given:
                raise self.fail(f"{node.op_type} lacks its attribute '{name}'", describe(node))

    def recursion(self) -> None:
        """Refuse functions that call each other in a circle."""
        calls = {
            key: {
                called
                for node in all_nodes(function.node)
                if (called := (node.domain, node.op_type, node.overload)) in self.functions
            }
            for key, function in self.functions.items()
        }
        done: set[tuple[str, str, str]] = set()
        while ready := {key for key, called in calls.items() if key not in done and called <= done}:
            done |= ready
        if len(done) < len(calls):
            raise self.fail(f"the function '{min(set(calls) - done)[1]}' calls itself")


@cache
def _schema(operator: str, domain: str, version: int) -> Any:
    try:
        return onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return None


@cache
def _checked_domains() -> frozenset[str]:
    """Domains of which every operator has a schema."""
    return frozenset(s.domain for s in onnx.defs.get_all_schemas())


def _close(word: str, known: set[str]) -> bool:
    return nearest(word, known).startswith("did you mean")


def _documented(node: Any) -> str:
    return f"https://onnx.ai/onnx/operators/onnx__{node.op_type}.html"


def _bodies(node: Any) -> Iterator[Any]:
    for attr in node.attribute:
        if attr.type == onnx.AttributeProto.GRAPH:
            yield attr.g
        elif attr.type == onnx.AttributeProto.GRAPHS:
            yield from attr.graphs


def all_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from all_nodes(body.node)


def _reads(node: Any) -> Iterator[str]:
    """The names that a node reads, in its bodies too unless they are made there."""
    yield from filter(None, node.input)
    for body in _bodies(node):
        own = {v.name for v in body.input} | {t.name for t in body.initializer}
        own.update(name for inner in body.node for name in inner.output)
        for inner in body.node:
            yield from (name for name in _reads(inner) if name not in own)


def _order(waiting: Sequence[set[int]]) -> list[int]:
    """A topological order of nodes ``i`` that wait for ``waiting[i]``, as near to theirs as can be."""
    import heapq

    readers: list[list[int]] = [[] for _ in waiting]
    for i, reads in enumerate(waiting):
        for maker in reads:
            readers[maker].append(i)
    left = [len(reads) for reads in waiting]
    ready = [i for i, count in enumerate(left) if not count]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers[i]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, reader)
    return order


def _cycle(waiting: Sequence[set[int]], stuck: set[int]) -> list[int]:
    """A cycle among nodes of which each waits for another one of them."""
    path: list[int] = []
    at = min(stuck)
    while at not in path:
        path.append(at)
        at = min(waiting[at] & stuck)
    return [*reversed(path[path.index(at) :]), path[-1]]
