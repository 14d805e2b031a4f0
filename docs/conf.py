"""How the site is built: text notebooks that run at every build, and an API reference taken from the docstrings.

`make docs` turns warnings into errors. Nothing is fetched while building, so there is no intersphinx.
"""

import os
import types
from importlib.metadata import version as installed_version

from sphinx.application import Sphinx
from sphinx.util import logging

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # pages say what they say on a CPU, wherever the site is built

import attnjax

project = "attnjax"
author = "the attnjax authors"
copyright = author
version = release = installed_version("attnjax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
nitpicky = False  # types such as jax.Array have no page here
default_role = "code"  # docstrings write `[*B, T, N, H]` with single backticks

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings give shape, dtype and unit
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "attnjax"
html_static_path = ["_static"]
html_css_files = ["attnjax.css"]
html_theme_options = {
    "show_toc_level": 2,
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
            logging.getLogger(__name__).warning("attnjax.%s is public and is not in api.md", name)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", check_reference)
