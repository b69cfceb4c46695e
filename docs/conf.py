"""Sphinx configuration of the documentation site: ``make docs`` builds it, offline."""

import re
from importlib.metadata import version as installed

from docutils import nodes
from sphinx.application import Sphinx

project = "WeakMedSAM"
author = "the WeakMedSAM contributors"
release = version = installed("weakmedsam")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "none"

myst_heading_anchors = 3

autodoc_default_options = {"members": True, "ignore-module-all": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_custom_sections = [("Keys", "params_style")]

html_theme = "furo"
html_title = "WeakMedSAM"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False


def mark_numbers(app: Sphinx, page: nodes.document) -> None:
    """Give cells that hold only numbers a class of their own: values of several seeds stay on one line."""
    for cell in page.findall(nodes.entry):
        if re.fullmatch(r"[\d.,;±%+\- ()]+", cell.astext()):
            cell["classes"].append("numbers")


def skip_aliases(app: Sphinx, kind: str, name: str, item: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples, which Python describes as "Alias for field number 0"."""
    return True if (getattr(item, "__doc__", None) or "").startswith("Alias for field number") else None


def escape_shapes(app: Sphinx, kind: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Keep the star of ``(B, C, *space)`` and the bars of ``|x|``, which reStructuredText takes for markup."""
    text = re.sub(
        r"``.*?``|\*(?=\w+(?![\w*]))|\|",
        lambda found: found[0] if found[0].startswith("``") else f"\\{found[0]}",
        "\n".join(lines),
        flags=re.DOTALL,
    )
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> None:
    """Connect what this file adds."""
    app.connect("autodoc-process-docstring", escape_shapes)
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("doctree-read", mark_numbers)
