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

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

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


def setup(app: Sphinx) -> None:
    """Connect what this file adds."""
    app.connect("doctree-read", mark_numbers)
