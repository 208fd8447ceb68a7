"""Put results into the documentation: tables between the marks in docs/performance.md, and the plots.

    python -m loadtests.publish RESULTS.json [OPTIONS.md]

RESULTS.json is what loadtests.bench has written, OPTIONS.md what loadtests.options has printed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from .measure import ROOT, BenchError
from .plots import plot

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"


def put(page: str, mark: str, text: str) -> str:
    """The page with this text between the marks. Raises ValueError if it has none."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    if begin not in page or end not in page:
        raise ValueError(f"{PAGE} has no marks for {mark}")
    return re.sub(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + text.strip() + "\n" + end, page, flags=re.S
    )


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m loadtests.publish RESULTS.json [OPTIONS.md]", file=sys.stderr)
        return 2
    try:
        results = Path(arguments[0])
        output = json.loads(results.read_text())
        facts = ", ".join(f"{name} {value}" for name, value in output["machine"].items())
        page = put(PAGE.read_text(), "results", f"{facts}\n\n{results.with_suffix('.md').read_text()}")
        if len(arguments) > 1:
            page = put(page, "options", Path(arguments[1]).read_text())
        PLOTS.mkdir(exist_ok=True)
        plot(output, PLOTS / "bench")
    except (BenchError, OSError, ValueError, KeyError) as error:
        print(f"python -m loadtests.publish: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
