"""The code blocks of the Markdown pages, and what a comment before one says of it. Nothing is run here.

| block | what is done with it |
| --- | --- |
| python | run as a script; one that serves forever is connected to, and must end with status 0 after SIGTERM |
| python with functions `test_...` | run by pytest |
| console | what is behind `$ ` is run by bash; its output must be what follows (`...`: anything). Servers stay up |
| sh, or no language | each line is checked: options of gtcpserver by its own parser, targets of make, extras of pip |
| json | parsed |
| text, or indented | output and pictures, no code |
| anything else | must be marked |
| sh, in a page that is typed from an empty folder | run: it makes the folder and the environment of all that follows |

A comment right before a block:

    <!-- not run: WHY -->               python and others: left alone. sh: only programs that are not ours are
    <!-- needs: MODULE -->              left out where this module is not installed
    <!-- file: NAME -->                 written to a file, which a later block of the page uses
    <!-- given: CODE -->                python: is run before it, but not shown
    <!-- continues -->                  python: goes on where the last block of Python ended
    <!-- checked by: COMMAND {file} --> the command, which is given the block as a file, must end with status 0
    <!-- restart -->                    console: servers that run are stopped first
    <!-- fails -->                      console: the last command must end with another status than 0

and right after one of Python:

    <!-- then:
    CODE -->                            is run behind it, but not shown; `talk` of doc_helpers.py is there
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

MARK = re.compile(
    r"<!--\s*(not run|needs|file|given|continues|checked by|restart|fails|then)\s*(?::\s*(.*?))?\s*-->", re.DOTALL
)

#: Where an address names a port. Each page gets free ones in their place, since tests run side by side.
PORT = re.compile(r"""(?<=127\.0\.0\.1[: ])\d{2,5}\b|(?<="127\.0\.0\.1",\ )\d{2,5}\b|(?<=["\ ]\*:)\d{2,5}\b
    |(?<=localhost[: ])\d{2,5}\b|(?<=0\.0\.0\.0:)\d{2,5}\b|(?<=-p\ )\d{4,5}\b""", re.VERBOSE)  # fmt: skip


@dataclass
class Block:
    """One code block.

    Attributes:
        path: the page.
        line: of the page, from 1.
        language: the first word behind the fence.
        marks: from the comments beside it: name and text.
        before: the paragraph above it.
    """

    path: Path
    line: int
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)
    before: str = ""

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line} ({self.language or 'no language'})"


@dataclass
class Step:
    """A command of a console block, and the lines that are said to come out."""

    command: str
    output: str = ""


def find_blocks(path: Path) -> list[Block]:
    """The code blocks of a page, in order; directives of Sphinx are none."""
    blocks: list[Block] = []
    marks: dict[str, str] = {}
    before = ""
    for token in MarkdownIt("commonmark").parse(path.read_text()):
        if token.type == "html_block":
            found = {name: (text or "").strip("\n") for name, text in MARK.findall(token.content)}
            if "then" in found and blocks:
                blocks[-1].marks["then"] = found.pop("then")
            marks |= found
        elif token.type in ("fence", "code_block"):
            info = token.info.split() if token.type == "fence" else ["indented"]
            language = info[0] if info else ""
            if not language.startswith("{"):
                blocks.append(Block(path, token.map[0] + 1, language, token.content, marks, before))
            marks, before = {}, ""
        elif token.type == "inline":
            before = token.content
        elif token.level == 0 and token.type.endswith("_open"):
            assert not marks, f"{path}: {marks} is not right before a code block"
    assert not marks, f"{path}: {marks} is not right before a code block"
    return blocks


def find_ports(text: str) -> set[str]:
    return set(PORT.findall(text))


def replace_ports(text: str, ports: dict[str, int]) -> str:
    return PORT.sub(lambda match: str(ports.get(match[0], match[0])), text)


def steps(code: str) -> list[Step]:
    """The commands of a console block with their outputs."""
    found: list[Step] = []
    for line in code.splitlines():
        if line.startswith("$ "):
            found.append(Step(line[2:]))
        elif found and found[-1].command.endswith("\\"):
            found[-1].command += "\n" + line.removeprefix("> ")
        else:
            assert found, f"a console block begins with '$ COMMAND', got {line!r}"
            found[-1].output += line + "\n"
    return found


def matches(expected: str, output: str) -> bool:
    """Whether the output is what was expected; `...` stands for anything, blanks at the ends of lines for nothing."""
    pattern = re.escape(_tidy(expected)).replace(r"\.\.\.", ".*?")
    return re.fullmatch(pattern, _tidy(output), re.DOTALL) is not None


def begins(expected: str, output: str) -> bool:
    """The same for the beginning of an output that goes on."""
    pattern = re.escape(_tidy(expected)).replace(r"\.\.\.", ".*?")
    return re.match(pattern, _tidy(output), re.DOTALL) is not None


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.replace("\r", "").strip().splitlines())


def command_lines(code: str) -> list[str]:
    """The commands of an sh block, those that are continued in one line."""
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip()]
