"""Sphinx builds the site: `make docs`."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import ot_diffusers

project = "ot-diffusers"
author = copyright = "The ot-diffusers contributors"
release = ot_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["site"]
default_role = "code"  # docstrings write `name`, as Markdown does

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what the arguments are, with shapes and ranges
autodoc_inherit_docstrings = False
napoleon_use_rtype = False
copybutton_prompt_text = ">>> "

html_theme = "furo"
html_title = "ot-diffusers"
html_math_renderer = "mathml"
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def inline_formula(translator: HTML5Translator, node: nodes.math) -> None:
    """MathML, which browsers show without a script."""
    translator.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def formula(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def keep_bars(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """|x| is an absolute value in our docstrings, and would be a substitution."""
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_bars)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
