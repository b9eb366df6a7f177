"""Sphinx's settings. The site is built without a network: ``make docs``, and in the tests with ``-W -n``.

``inventories/`` holds, as text, the names of torch and Lightning that our docstrings mention, with their addresses.
Sphinx wants such lists compressed, so they are compressed here.
"""

import zlib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

import lowbit_lightning

HERE = Path(__file__).parent

project = "lowbit_lightning"
author = "the lowbit_lightning developers"
copyright = "the lowbit_lightning developers, Apache-2.0"
release = lowbit_lightning.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "inventories"]
html_theme = "furo"
html_title = f"lowbit_lightning {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

autoclass_content = "both"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # of Lightning's hooks
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = True
# Names in signatures that have no page: type variables, and classes whose public children say all.
nitpick_ignore_regex = [
    ("py:(class|obj)", r"Tensor|torch\.utils\.hooks\.RemovableHandle"),
    ("py:(class|obj)", r"lowbit_lightning\.(convert|layers)\.\w+\.(Module|Setting|Selection)"),
    ("py:class", r"lowbit_lightning\.layers\.\w+\.(LowBitWeight|Int8Matrix|Projections|_Built)"),
    ("py:class", r"lowbit_lightning\.(kernels\.rules\.rule\.Rule|optim\.settings\.Settings)"),
    ("py:class", r"lowbit_lightning\.precision\.(int8\.Int8Mixed|in_step\.InStep)"),
    ("py:class", r"lowbit_lightning\.strategies\.deepspeed\.strategy\._LightningsStrategy"),
]


def _inventory(name: str, folder: Path) -> str:
    """A file that intersphinx reads, of ``inventories/NAME.txt``: lines of name, role and address."""
    lines = (HERE / "inventories" / f"{name}.txt").read_text().splitlines()
    entries = [line.split() for line in lines if line and not line.startswith("#")]
    text = "".join(f"{what} py:{role} 1 {address} -\n" for what, role, address in entries)
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The rest is compressed with zlib.\n"
    path = folder / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode() + zlib.compress(text.encode()))
    return str(path)


SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
}


def setup(app: Sphinx) -> None:
    def offline(app: Sphinx, config: Config) -> None:
        config.intersphinx_mapping = {
            name: (address, _inventory(name, Path(app.doctreedir))) for name, address in SITES.items()
        }

    def plain(app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
        """A property's docstring is prose: without this, napoleon takes what stands before a colon for its type."""
        if what in ("attribute", "property"):
            lines[:0] = ["..", ""]  # an empty comment

    app.connect("config-inited", offline)
    app.connect("autodoc-process-docstring", plain, priority=400)
