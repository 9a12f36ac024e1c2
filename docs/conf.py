"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "claudegw"
author = "The claudegw founders"
project_copyright = "The claudegw founders"

extensions = ["myst_parser", "docs.config_reference"]
exclude_patterns = ["__pycache__"]
nitpicky = True

# Headings can be linked to, as on the page of a repository.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

html_theme = "alabaster"
html_theme_options = {
    "description": "The gateway between Claude Code and your own models",
    "fixed_sidebar": True,
    "page_width": "1100px",
}
# Nothing is loaded from elsewhere, and nothing of the build goes into a page.
html_copy_source = False
html_show_sourcelink = False
