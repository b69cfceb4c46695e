"""Sphinx configuration of the documentation site: ``make docs`` builds it, offline."""

from importlib.metadata import version as installed

project = "WeakMedSAM"
author = "the WeakMedSAM contributors"
release = version = installed("weakmedsam")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "WeakMedSAM"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
