"""YAML into plain values, with the line of every node, and bounds against files that are made to explode."""

from typing import Any

import yaml

MAX_NODES = 200_000
MAX_DEPTH = 64


class YamlError(ValueError):
    """Bytes that are no YAML within the bounds; ``line`` is 0 where none can be named."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


def read(raw: bytes) -> tuple[Any, yaml.Node | None]:
    """The value and the node tree of one YAML document. Raises YamlError."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise YamlError("not UTF-8", raw[: error.start].count(b"\n") + 1) from None
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None, None
            _check_size(root)
            return loader.construct_document(root), root
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise YamlError(" ".join(str(problem).split())[:300], mark.line + 1 if mark else 0) from None
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        # PyYAML lets errors of its scalar constructors through, for example a date with month 13.
        raise YamlError(" ".join(str(error).split())[:300] or "not valid YAML") from None


def line_of(root: yaml.Node | None, path: tuple[str | int, ...]) -> int:
    """Line, from 1, of the node at ``path`` or of its nearest parent; 0 without a tree."""
    if root is None:
        return 0
    node, line = root, root.start_mark.line + 1
    for part in path:
        found = _child(node, part)
        if found is None:
            return line
        node, line = found
    return line


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child = node.value[part]
        return child, child.start_mark.line + 1
    return None


def _refuse_duplicates(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise YamlError(f"{key.value[:64]!r} is given twice", key.start_mark.line + 1)
            seen.add(key.value)


def _check_size(root: yaml.Node) -> None:
    """Refuse trees that are too large once aliases are written out, and those that contain themselves."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        line = node.start_mark.line + 1
        if depth > MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH} levels", line)
        if id(node) in open_nodes:
            raise YamlError("an alias refers to what contains it", line)
        open_nodes.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(size(child, depth + 1) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(key, depth + 1) + size(value, depth + 1) for key, value in node.value)
            _refuse_duplicates(node)
        open_nodes.discard(id(node))
        if total > MAX_NODES:
            raise YamlError(f"more than {MAX_NODES} values", line)
        sizes[id(node)] = total
        return total

    size(root, 0)
