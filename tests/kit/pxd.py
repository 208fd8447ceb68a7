"""Compares .pxd files with the .py files beside them: Cython accepts a .pxd file that says something else.

An attribute that the .pxd file forgets is an AttributeError in the compiled form alone; one that ``__slots__`` forgets,
in the pure form alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Slots that have a meaning for Python: a compiled class may have them for reasons of its own.
SPECIAL = {"__weakref__", "__dict__"}


@dataclass
class Function:
    """Names of the arguments, and how many of the last have defaults."""

    arguments: list[str]
    defaults: int


@dataclass
class Class:
    bases: list[str] = field(default_factory=list)
    attributes: set[str] = field(default_factory=set)
    methods: dict[str, Function] = field(default_factory=dict)


@dataclass
class Types:
    """What a .pxd file declares of a .py file. (What it defines itself, inline, has no counterpart there.)"""

    classes: dict[str, Class] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)

    def attributes_of(self, name: str) -> set[str]:
        found = self.classes.get(name, Class())
        return found.attributes.union(*map(self.attributes_of, found.bases))


def compare(pxd: str, source: str) -> list[str]:
    """Return what differs, a line each."""
    types = read_pxd(pxd)
    tree = ast.parse(source)
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    problems = list(_compare_functions("", types.functions, tree))
    for name, declared in types.classes.items():
        if name not in classes:
            problems.append(f"{name}: no such class")
            continue
        slots = _read_slots(classes[name], tree)
        place = "__slots__" if slots is not None else "the class"
        there = _assigned(classes[name]) if slots is None else slots
        if slots is None:  # a subclass assigns to what the class above declares, too
            there -= {attribute for base in declared.bases for attribute in types.attributes_of(base)}
        problems += [f"{name}.{slot}: not in the .pxd file" for slot in sorted(there - declared.attributes - SPECIAL)]
        problems += [f"{name}.{slot}: not in {place}" for slot in sorted(declared.attributes - there - SPECIAL)]
        problems += _compare_functions(f"{name}.", declared.methods, classes[name])
    return problems


# -- .py ---------------------------------------------------------------------------------------------------------------


def _compare_functions(prefix: str, declared: dict[str, Function], owner: ast.AST) -> Iterator[str]:
    found = {node.name: _read_function(node) for node in _statements(owner) if isinstance(node, ast.FunctionDef)}
    for name, function in declared.items():
        if name not in found:
            yield f"{prefix}{name}: no such function"
        elif found[name] != function:
            yield f"{prefix}{name}: the .pxd file has {function}, the source {found[name]}"


def _read_function(node: ast.FunctionDef) -> Function:
    arguments = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    return Function(arguments, len(node.args.defaults) + sum(default is not None for default in node.args.kw_defaults))


def _read_slots(node: ast.ClassDef, module: ast.Module) -> set[str] | None:
    """Return those of the class itself, or None if it has none. They are literal, or the name of a literal."""
    found = None
    for statement in _statements(node):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__slots__":
            value = statement.value
            if isinstance(value, ast.Name):
                (value,) = (
                    other.value
                    for other in _statements(module)
                    if isinstance(other, ast.Assign) and ast.unparse(other.targets[0]) == value.id
                )
            names = ast.literal_eval(value)
            found = (found or set()) | ({names} if isinstance(names, str) else set(names))
    return found


def _assigned(node: ast.ClassDef) -> set[str]:
    """Return the attributes that methods of the class assign to."""
    return {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and ast.unparse(child.value) == "self"
    }


def _statements(owner: ast.AST) -> Iterator[ast.stmt]:
    """Those of a class or module, also below `if`."""
    for node in ast.iter_child_nodes(owner):
        if isinstance(node, ast.If):
            yield from _statements(node)
        elif isinstance(node, ast.stmt):
            yield node


# -- .pxd --------------------------------------------------------------------------------------------------------------


def read_pxd(text: str) -> Types:
    """Read the declarations that have a counterpart in the .py file. Raise ValueError for what is not understood."""
    found = Types()
    owner: Class | None = None  # the class of the lines that are indented
    for indent, line in _logical_lines(text):
        if indent == 0:
            owner = None
            if match := re.match(r"cdef class (\w+)(?:\((.*)\))?:$", line):
                owner = found.classes[match[1]] = Class(re.findall(r"[\w.]+", match[2] or ""))
            elif _declares_function(line):
                name, function = _read_declaration(line)
                found.functions[name] = function
        elif owner is None or line in ("pass", "..."):
            continue  # the body of an inline function, or of "cdef extern from"
        elif _declares_function(line):
            name, function = _read_declaration(line)
            owner.methods[name] = function
        elif match := re.match(r"cdef (?:public |readonly )?([\w.]+[ *\w,]*)$", re.sub(r"\[.*?\]", "", line)):
            owner.attributes |= {re.findall(r"\w+", part)[-1] for part in match[1].split(",")}
        else:
            raise ValueError(f"what is this? {line}")
    return found


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield indentation and text of each declaration: without comments, decorators, and bodies of inline functions."""
    text = re.sub(r'(?s)"""(.*?)"""', "pass", text)
    text = re.sub(r"#.*", "", text)
    while "(" in text and (shorter := re.sub(r"(\([^()]*?)\s*\n\s*", r"\1 ", text)) != text:
        text = shorter  # what is open in brackets goes on
    body: int | None = None  # the indentation of an inline function
    for line in text.splitlines():
        indent, line = len(line) - len(line.lstrip()), line.strip()
        if not line or line.startswith("@"):
            continue
        if body is not None and indent > body:
            continue
        body = indent if re.match(r"cp?def inline\b", line) else None
        if body is None:
            yield indent, line


def _declares_function(line: str) -> bool:
    return bool(re.match(r"(cdef|cpdef) (?!class|extern|enum|struct|union|packed)[^=]*?\w\(", line))


def _read_declaration(line: str) -> tuple[str, Function]:
    match = re.match(r"cp?def [^()]*?(\w+)\((.*?)\)[^()]*$", line)
    if match is None:
        raise ValueError(f"what is this? {line}")
    arguments, defaults = [], 0
    for text in filter(None, (text.strip() for text in match[2].split(","))):
        name, _, default = text.partition("=")
        defaults += bool(default)
        arguments.append(re.findall(r"\w+", re.sub(r" (not|or) None", "", name))[-1])
    return match[1], Function(arguments, defaults)
