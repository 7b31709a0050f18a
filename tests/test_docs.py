"The documentation builds without a warning, has every public name with its parameters, and opens offline."

import html
import importlib
import inspect
import re
import subprocess
import sys

from conftest import ROOT
from fastcore.docments import docments
from test_notebooks import EXPLORE, LIBRARY, module

MODULES = [module(path) for path in LIBRARY]


def build_site(folder):
    "As `make docs` does."
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--doctree-dir", folder / "doctrees", ROOT / "nbs", folder / "html"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


def words(text):
    "Letters and digits alone: typography aside."
    return re.sub(r"[\W_]+", "", text)


def every_public_name_has_its_parameters(site):
    assert len(MODULES) > 15
    commented = 0
    for name in MODULES:
        page = (site / f"api/{name}.html").read_text()
        plain = words(html.unescape(re.sub(r"<[^>]+>", "", page)))
        library = importlib.import_module(f"saltlib.{name}")
        for public in library.__all__:
            assert f'id="saltlib.{name}.{public}"' in page, f"{name}.{public}"
            if inspect.isfunction(thing := getattr(library, public)):
                missing = [c for c in (thing.__doc__, *docments(thing).values()) if c and words(c) not in plain]
                assert not missing, f"{name}.{public}"
            elif inspect.isclass(thing):
                fields = re.findall(r"^    \w+: .*?  # (.+)$", inspect.getsource(thing), re.MULTILINE)
                commented += len(fields)
                assert not [c for c in fields if words(c) not in plain], f"{name}.{public}"
    assert commented > 50


def every_notebook_and_the_pictures_of_readme_are_there(site):
    pages = {str(p.relative_to(site)) for p in site.rglob("*.html")}
    assert {str(p.relative_to(ROOT / "nbs").with_suffix(".html")) for p in LIBRARY + EXPLORE} <= pages
    first = (site / "index.html").read_text()
    assert "Two commands" in first and all((site / src).is_file() for src in re.findall(r'<img [^>]*src="([^"]+)"', first))
    assert "images/section.jpg" in first and "images/overview.svg" in first


def no_page_asks_another_address(site):
    asks = re.compile(
        r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
        r"""|url\(["']?(?:https?:)?//|@import\s+["'](?:https?:)?//"""
    )
    found = [f"{p.name}: {hit[0]}" for p in site.rglob("*") if p.suffix in (".html", ".css") for hit in asks.finditer(p.read_text())]
    assert not found


def test_documentation(tmp_path):
    site = build_site(tmp_path)
    every_public_name_has_its_parameters(site)
    every_notebook_and_the_pictures_of_readme_are_there(site)
    no_page_asks_another_address(site)
