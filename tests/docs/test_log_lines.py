"""The table of log lines in docs/operations.md: each line is one that the package writes."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Placeholders of the table, and the seams of lines that are put together from several texts.
PLACEHOLDER = re.compile(
    r"\.\.\.|\b(?:ADDRESS|GTCPSERVER_|FILE:LINE|FILE|KEY|NAME|PATH|PEER|STEP|URL|SIG[A-Z]+|[KMNPS])\b"
    r"|\b(?:connections|jobs)\b|workers have the new code,|failed:|: Too many open files|; trying again"
)
FORMAT = re.compile(r"%(?:\.\d)?[sdf]")


def written():
    """All texts of the package, with placeholders as "...", and implicitly joined ones joined."""
    texts = []
    for path in (ROOT / "gtcpserver").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(FORMAT.sub("...", node.value))
    return "\n".join(texts)


def documented():
    table = (ROOT / "docs" / "operations.md").read_text().split("## Log lines")[1].split("\n\n")[1]
    rows = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    return [line for row in rows for line in re.findall(r"`([^`]+)`", row)]


def test_each_line_in_the_table_is_one_that_the_package_writes():
    texts, lines = written(), documented()
    assert len(lines) > 40
    parts = {(line, part.strip(" :;,()")) for line in lines for part in PLACEHOLDER.split(line)}
    unknown = sorted((line, part) for line, part in parts if len(part) > 3 and part not in texts)
    assert not unknown
