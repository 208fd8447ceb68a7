"""Sphinx: the Markdown pages beside this file as HTML (`make docs`). It uses no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode.parser import VariableCommentPicker

import gtcpserver

project = "gtcpserver"
version = release = gtcpserver.__version__
copyright = "the authors of gtcpserver, MIT licence"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
smartquotes = False  # b"" is code
highlight_language = "none"  # a block says its language

# Of a console block only the commands are copied.
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

myst_heading_anchors = 3
myst_url_schemes = ("http", "https", "mailto")

html_theme = "furo"
html_title = f"gtcpserver {release}"
html_static_path = ["_static"]
html_css_files = ["gtcpserver.css"]
html_favicon = "_static/favicon.svg"
html_show_sphinx = False
html_copy_source = False

napoleon_numpy_docstring = False
napoleon_custom_sections = [("Raises (from the calls inside)", "Raises")]
default_role = "code"  # `name` in a docstring
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

nitpicky = True
# Types of Python, gevent and others: their documentation is on the network, and what is inside of ours is not public.
nitpick_ignore_regex = [
    ("py:.*", r"(?!gtcpserver\.).*"),
    ("py:class", r"gtcpserver\.(testing\.client\.Result|signatures\.ConnectionT|coroutines\.T)"),  # type variables
    ("py:class", r"gtcpserver\.(listening\.listener|connection\.stream|shared\.column|tls\.contexts)\.\w+"),
    ("py:class", r"gtcpserver\.store\.store\.\w+"),
    ("py:class", r"gtcpserver\.tls\.acme\.settings\.\w+"),
    ("py:class", r"gtcpserver\.supervisor\.(fleet|lending|system)\.\w+"),
    ("py:class", r"gtcpserver\.proxy\.(buckets|departures|gate|limits|record|resolve|rules|succession|target)\.\w+"),
    ("py:class", r"gtcpserver\.proxy\.(this_host|transparent|udp|upstream_group)\.\w+"),
    ("py:class", r"gtcpserver\.proxy\.errors\.QuotaUsedUp"),
]

# Overloads are for type checkers. The signature beside them has all options by name, with their defaults.
VariableCommentPicker.is_overload = lambda self, decorators: False  # type: ignore[method-assign]

PICTURE = re.compile(r'<picture>\s*<source[^>]*srcset="([^"]+)">\s*<img alt="([^"]*)" src="([^"]+)">\s*</picture>')
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:examples|loadtests|tests)/[^)]*)\)")


def setup(app: Sphinx) -> None:
    app.add_lexer("nft", TextLexer)
    app.connect("source-read", as_the_theme_wants)
    app.connect("missing-reference", by_public_name)
    app.connect("autodoc-process-docstring", without_words_of_builtin_types)
    app.connect("autodoc-process-docstring", with_examples_in_colour)


def as_the_theme_wants(app: Sphinx, docname: str, source: list[str]) -> None:
    """Pictures follow the theme's own switch between light and dark; links to the repository become plain text."""

    def images(match: re.Match[str]) -> str:
        dark, text, light = match.groups()
        return "\n".join(
            f"```{{image}} {file}\n:alt: {text}\n:class: only-{theme}\n```\n"
            for theme, file in (("light", light), ("dark", dark))
        )

    def path(match: re.Match[str]) -> str:
        return f"`{match[2]}`" if match[1] in match[2] else f"{match[1]} (`{match[2]}`)"

    source[0] = OUTSIDE.sub(path, PICTURE.sub(images, source[0]))


def without_words_of_builtin_types(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Data have no docstring of their own: what is found is that of str or bool."""
    if what == "data":
        lines.clear()


def with_examples_in_colour(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """`Example::` in a docstring is Python; other blocks have no language."""
    for number, line in reversed(list(enumerate(lines))):
        if line == "Example::":
            lines[number : number + 1] = ["Example:", "", ".. code-block:: python"]


def public_names() -> Iterator[tuple[str, str]]:
    """Where a public class is defined, and the name by which a user imports it."""
    for name in gtcpserver.__all__:
        thing = getattr(gtcpserver, name)
        if hasattr(thing, "__qualname__"):
            yield f"{thing.__module__}.{thing.__qualname__}", f"gtcpserver.{name}"


PUBLIC = dict(public_names())


def by_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Any) -> nodes.Element | None:
    """Types in signatures are named by the module that defines them: find them under their public names."""
    target = node.get("reftarget", "")
    public = PUBLIC.get(target)
    if public is None or node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], public, node, contnode)
