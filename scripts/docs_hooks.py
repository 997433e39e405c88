"""Hooks of mkdocs: linked files of the repository become pages, and formulas become MathML.

In the repository, pages link to files outside docs/ (`../configs/mezo/opt.yaml`,
`../notebooks/03_mezo.ipynb`). The site gets a page for each of these: Markdown unchanged, a
notebook as text and code, any other file as a listing, a folder as the listings of its files.

Browsers draw MathML themselves, so pages need no script or font from another host.
"""

import html
import os
import re
import sys
from pathlib import Path, PurePosixPath

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
from docs_math import faults, mathml

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=[)#])")
IMAGES = (".png", ".svg")
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "notebooks/*.ipynb")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml"}

_sources: dict[str, str] = {}
"""Path of a page on the site to its file in the repository."""


def on_files(files: Files, config) -> Files:
    """Add a page for every linked file, and for files that those pages link to."""
    _sources.clear()
    _sources.update({file.src_uri: f"docs/{file.src_uri}" for file in files})
    waiting = [str(path.relative_to(ROOT)) for each in ALWAYS for path in sorted(ROOT.glob(each))]
    for file in files.documentation_pages():
        waiting += links(file.src_uri, file.content_string)
    while waiting:
        source = waiting.pop()
        uri = address(source)
        if uri in _sources or source.startswith("docs/"):
            continue
        _sources[uri] = source
        if source.endswith(IMAGES):
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
            continue
        text = page(ROOT / source)
        level = InclusionLevel.INCLUDED if _in_nav(uri, config.nav) else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, uri, content=text, inclusion=level))
        waiting += links(uri, text)
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Turn links between files of the repository into links between pages."""
    del config, files
    here = page.file.src_uri

    def moved(match: re.Match) -> str:
        target = _target(_sources[here], match[1])
        if not (ROOT / target).exists():
            return match[0]
        return os.path.relpath(address(target), PurePosixPath(here).parent)

    return LINK.sub(moved, markdown) if here in _sources else markdown


FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
"""A formula as pymdownx.arithmatex leaves it: `\\(...\\)` within a line, `\\[...\\]` on its own."""


def on_page_content(content: str, page, config, files) -> str:
    """Turn the formulas of a page, including its docstrings, into MathML."""
    del config, files

    def drawn(match: re.Match) -> str:
        tag, bracket, latex = match.groups()
        try:
            return f'<{tag} class="formula">{mathml(html.unescape(latex), bracket == "[")}</{tag}>'
        except ValueError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from error

    return FORMULA.sub(drawn, content)


def on_post_build(config) -> None:
    """Raise an error if a page has raw LaTeX or loads something from another host."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        if found := faults(path.read_text()):
            raise PluginError(f"{path.relative_to(config.site_dir)}: {found[0]}")


def links(uri: str, markdown: str) -> list[str]:
    """Return the files of the repository that a page links to."""
    found = [_target(_sources[uri], match[1]) for match in LINK.finditer(markdown)]
    return [target for target in found if (ROOT / target).exists()]


def _target(source: str, link: str) -> str:
    return os.path.normpath(PurePosixPath(source).parent / link)


def address(source: str) -> str:
    """Return the path on the site of a file's page.

    >>> address("docs/mezo.md"), address("configs/mezo/opt.yaml")
    ('mezo.md', 'configs/mezo/opt.md')
    """
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if source == "README.md":
        return "readme.md"  # mkdocs treats README.md as an index
    path = PurePosixPath(source)
    return source if path.suffix in IMAGES else str(path.with_suffix(".md"))


def page(path: Path) -> str:
    """Return a file or folder as Markdown."""
    if path.suffix == ".md":
        return path.read_text()
    if path.suffix == ".ipynb":
        return notebook(path.with_suffix(".py").read_text(), path.name)
    name = path.relative_to(ROOT)
    if path.is_dir():
        parts = [listing(each, f"## {each.name}") for each in sorted(path.glob("*.*"))]
        return f"# `{name}`\n\n" + "\n".join(parts)
    return listing(path, f"# `{name}`")


def listing(path: Path, title: str) -> str:
    """Return the text of a file as a code block under a title."""
    return f"{title}\n\n````{LANGUAGES.get(path.suffix, '')}\n{path.read_text()}````\n"


def notebook(source: str, name: str) -> str:
    """Convert a notebook in jupytext's percent format to Markdown, without outputs."""
    parts = []
    for cell in re.split(r"^# %%", source, flags=re.M)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.M))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    parts.insert(1, f"This is `notebooks/{name}`, which runs on a CPU without a network.")
    return "\n\n".join(parts) + "\n"


def _in_nav(uri: str, nav) -> bool:
    if isinstance(nav, str):
        return nav == uri
    values = nav.values() if isinstance(nav, dict) else nav or ()
    return any(_in_nav(uri, each) for each in values)
