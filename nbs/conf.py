"The documentation site, which `make docs` builds with Sphinx: README, the notebooks as they were saved, every public name."

import ast
import inspect
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from fastcore.docments import docments

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
project, author, release = (settings["DEFAULT"][key] for key in ("title", "author", "version"))
copyright = f"2026 onwards, {author}"

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["runs"]  # run notebooks are saved without outputs: a run has its own
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # from another address; sliders need a kernel anyway
myst_heading_anchors = 3  # README links to its own headings
html_theme = "furo"
html_title = project

# A page a module. Autodoc passes over constants, whose comments say more than their values: their source is shown.
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def module_page(
    source: Path,  # of a module of the library
) -> str:  # in reStructuredText
    "All its public names."
    name, text = f"saltlib.{source.stem}", source.read_text(encoding="utf-8")
    page = [f"{name}\n{'=' * len(name)}", f".. automodule:: {name}"]
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and (names := [n.id for n in ast.walk(statement.targets[0]) if isinstance(n, ast.Name) and n.id[0] != "_"]):
            lines = text.splitlines()[statement.lineno - 1 : statement.end_lineno]
            page += [".. py:data:: " + "\n             ".join(names), "   .. code-block:: python", "\n".join(f"      {line}" for line in lines)]
    return "\n\n".join(page) + "\n"


def field_comments(
    thing,  # a class of pydantic, which docments knows no fields of
) -> dict[str, str]:
    "The comment of each field."
    fields = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(thing), re.MULTILINE)
    return {name: comment for name, comment in fields if name in thing.model_fields}


def add_parameters(app, what, name, thing, options, lines):
    "The comment of each parameter and of what is returned."
    if what not in ("function", "method", "class"):
        return
    lines.append("")
    for parameter, comment in (field_comments(thing) if hasattr(thing, "model_fields") else docments(thing)).items():
        if comment:
            lines.append(f":{'returns' if parameter == 'return' else f'param {parameter}'}: {' '.join(comment.split())}")


def write_pages(app):
    "nbs/api/, anew."
    folder = Path(app.srcdir, "api")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source in Path(app.srcdir).parent.glob("saltlib/[a-z]*.py"):
        (folder / f"{source.stem}.rst").write_text(module_page(source), encoding="utf-8")


def setup(app):
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", add_parameters)
