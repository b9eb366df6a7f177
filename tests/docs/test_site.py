"""The site builds without a warning and without a network, and has a place for every public name."""

from __future__ import annotations

import importlib.util
import inspect
import io
import re
import socket
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.inventory import InventoryFile
from support.doc_blocks import ROOT

import lowbit_lightning

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Its folder, and what Sphinx warns of."""
    folder = tmp_path_factory.mktemp("site")
    warned = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Sphinx's own parts, about each other
        patch.setattr(socket.socket, "connect", _no_network)
        app = Sphinx(DOCS, DOCS, folder, folder / ".doctrees", "html", status=None, warning=warned, freshenv=True)
        app.build()
    yield folder, re.sub(r"\x1b\[[\d;]*m", "", warned.getvalue())
    sys.modules.pop("conf", None)


def _no_network(*_: object) -> None:
    raise AssertionError("the site must be built without a network")


def test_it_builds_without_a_warning(site: tuple[Path, str]) -> None:
    assert site[1].splitlines() == []


def test_every_public_name_has_a_place(site: tuple[Path, str]) -> None:
    inventory = InventoryFile.loads((site[0] / "objects.inv").read_bytes(), uri="")
    found = {name for role, names in inventory.data.items() if role.startswith("py:") for name in names}
    expected = {name for name, _ in public()}
    assert expected - found == set()


def test_no_figure_of_the_page_is_missing(site: tuple[Path, str]) -> None:
    for page in site[0].rglob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text()):
            assert source.startswith("data:") or (page.parent / source).is_file(), f"{page.name}: {source}"


def public() -> Iterator[tuple[str, object]]:
    """Each public name with its module, and its object."""
    for module in map(vars(lowbit_lightning).get, lowbit_lightning.__all__):
        if isinstance(module, types.ModuleType):
            for name in module.__all__:
                if callable(getattr(module, name)):  # constants are told where they are used
                    yield f"{module.__name__}.{name}", getattr(module, name)


def functions() -> Iterator[tuple[str, object]]:
    """Each public function and class, and the public methods that a class defines itself."""
    for name, value in public():
        if not isinstance(value, type) or not issubclass(value, (Exception, dict)):
            yield name, value
        if isinstance(value, type) and value.__module__.startswith("lowbit_lightning"):
            for own, method in vars(value).items():
                if inspect.isfunction(method) and (own == "__init__" or not own.startswith("_")):
                    yield f"{name}.{own}", method


def test_docstrings_name_arguments_that_exist() -> None:
    """A line of a description that isn't indented would become an argument of its own on the page."""
    faults = {name: found for name, value in functions() if (found := misread(value))}
    assert faults == {}


def misread(value: Any) -> list[str]:
    """What the page would show as an argument or as an exception, and is neither."""
    known = {*inspect.signature(value).parameters, *_keywords(value)}
    settings: Any = Config(napoleon_use_param=True)
    text = str(GoogleDocstring(inspect.cleandoc(value.__doc__ or ""), settings, what="function"))
    told = (name.strip() for names in re.findall(r"^:param (.+?):", text, re.MULTILINE) for name in names.split(","))
    raised = re.findall(r"^:raises ([^:]*):", text, re.MULTILINE)
    wrong = [name for name in told if name.replace("\\", "").strip("*") not in known]
    return wrong + [names for names in raised if not re.fullmatch(r"[\w.]+(, [\w.]+)*", names)]


def _keywords(value: Any) -> set[str]:
    """Those of a TypedDict that is unpacked into ``**options``."""
    options = importlib.import_module("lowbit_lightning.optim.options").Options
    return set(options.__annotations__) if "Unpack[" in str(inspect.signature(value)) else set()


def test_the_pictures_are_those_that_the_reports_give() -> None:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "images" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    pictures = drawn.pictures()
    for file, text in pictures.items():
        assert file.read_text() == text, "run python docs/images/draw.py"
    readme, light = (ROOT / "README.md").read_text(), pictures[DOCS / "images" / "gain-light.svg"]
    for figure in re.findall(r">([\d,.]+) (?:ms|GB)<", light):
        assert figure in readme, f"README's description of the picture lacks {figure}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name: str) -> None:
    """Of the files that Sphinx doesn't read, or not where they lie."""
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if "://" in path:
            continue
        file = ROOT / path if path else ROOT / name
        assert file.exists(), path
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{path}#{anchor}: it has {sorted(slugs)}"


def test_errors_in_troubleshooting_are_those_that_are_raised_and_in_order() -> None:
    text = (DOCS / "troubleshooting.md").read_text().split("\n## Wrong")[0]
    sources = [*(ROOT / "lowbit_lightning").rglob("*.py"), *(ROOT / "lowbit_command").rglob("*.py")]
    joined = "".join(re.sub(r'"\s*\n\s*[rf]?"', "", path.read_text()) for path in sources)
    said = re.sub(r"\{[^{}]*\}", "...", joined)
    others = ("Precision 'int8-mixed'", "Found invalid type", "KeyError", "of the kernel cache")  # not our own text
    errors, _, warned = text.partition("\n## Warnings")
    for part in (errors, warned):
        headings = re.findall(r"^### (.*)$", part, re.MULTILINE)
        plain = [re.sub(r"`CompileError`: |`", "", heading) for heading in headings]
        assert headings == sorted(headings, key=lambda heading: heading.replace("`", "").lower())
        for heading in (one for one in plain if not one.startswith(others)):
            cut = re.split(r"\.\.\.|'int8-mixed'|torch\.float32|; the page|\(or writing\)", heading)
            pieces = [piece.strip(" ,") for piece in cut if len(piece) > 8]
            missing = [piece for piece in pieces if piece not in said]
            assert not missing, f"{heading!r}: no message says {missing}"
