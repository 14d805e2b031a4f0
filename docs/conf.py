"""How the site is built: text notebooks that run at every build, and an API reference taken from the docstrings.

`make docs` turns warnings into errors. Nothing is fetched, neither to build a page nor to read it: no intersphinx, and
formulas are MathML.
"""

import os
import re
import types
from importlib.metadata import version as installed_version
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # pages say what they say on a CPU, wherever the site is built

import attnjax

log = logging.getLogger(__name__)

project = "attnjax"
author = "the attnjax authors"
version = release = installed_version("attnjax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
nitpicky = False  # types such as jax.Array have no page here
highlight_language = "text"  # of indented blocks; fenced ones say their own
default_role = "code"  # docstrings write `[*B, T, N, H]` with single backticks

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
# Pages that train take minutes. `-t quick` leaves them as they stand: tests/test_training.py runs them, in fewer steps.
nb_execution_excludepatterns = ["training/*"] if tags.has("quick") else []  # noqa: F821, Sphinx gives `tags`
nb_execution_timeout = 900  # seconds; the pages that train take minutes
nb_render_markdown_format = "myst"  # of outputs: tables, too
nb_merge_streams = True
nb_output_stderr = "warn"  # a page that prints a warning is an error, too

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings give shape, dtype and unit
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "attnjax"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["attnjax.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search field stands in the side bar
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def public_names() -> list[str]:
    """What `attnjax` exports, modules left out."""
    names = (name for name in vars(attnjax) if not name.startswith("_"))
    return sorted(name for name in names if not isinstance(getattr(attnjax, name), types.ModuleType))


def check_reference(app: Sphinx) -> None:
    """Warns of every public name that the API reference leaves out."""
    with open(os.path.join(app.srcdir, "api.md"), encoding="utf-8") as page:
        words = page.read().split()
    for name in public_names():
        if f"attnjax.{name}" not in words:
            log.warning("attnjax.%s is public and is not in api.md", name)


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lets docstrings be plain text: `code` in backticks, indented formulas, and `*` and `|` that mean themselves."""
    made: list[str] = []
    before_sections, example = True, False
    for line in lines:
        before_sections = before_sections and not re.fullmatch(r"[A-Z][a-z]+:", line)
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        formula = before_sections and line.startswith("    ")
        if formula and not made[-1]:
            made += ["::", ""]
        several = None if before_sections or example else re.fullmatch(r"( +)(\w+(?:, \w+)+): (.*)", line)
        if several and "Attributes:" in made:  # napoleon knows several names in Args only
            indent, names, text = several.groups()
            made += [f"{indent}{name}: {_escaped(text)}" for name in names.split(", ")]
        else:
            made.append(line if example or formula else _escaped(line))
    lines[:] = made


def _escaped(line: str) -> str:
    """A line with `*` and `|` escaped outside of backticks; a letter may follow a closing backtick."""
    parts = re.split(r"(`[^`]+`)", line)
    texts = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
    codes = [
        f"{code}\\ " if after[:1].isalnum() else code for code, after in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return "".join(text + code for text, code in zip(texts, [*codes, ""], strict=True))


def mathml(self: Any, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers draw without a script."""
    block = isinstance(node, nodes.math_block)
    tag = "div" if block else "span"
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        log.warning("formula %s: %s", node.astext(), error, location=node)
        formula = self.encode(node.astext())
    self.body.append(self.starttag(node, tag, "", CLASS="math") + formula + f"</{tag}>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("builder-inited", check_reference)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
