"""How the documentation is built: Markdown pages, and a reference from what the running package says of itself."""

from __future__ import annotations

project = "tg_tinker"
author = "The tg_tinker authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
