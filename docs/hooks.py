"""Pages of the site that live elsewhere in the repository, with their links made the site's."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parent.parent
# Path in the repository -> path on the site.
PAGES = {
    "README.md": "index.md",
    "docs/guide.md": "guide.md",
    "recipes/TUTORIAL.md": "tutorial.md",
    "swan_surgery/LIMITS.md": "limits.md",
    "benchmarks/TABLES.md": "tables.md",
    "swan_surgery/README.md": "how-it-works.md",
    "swan_surgery/channels/README.md": "new-operation.md",
    "recipes/README.md": "recipes.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_PICTURES = ("benchmarks/report.png",)
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not below docs/."""
    for path, page in PAGES.items():
        if not path.startswith("docs/"):
            text = (ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    for path in _PICTURES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - mkdocs gives them
    """Links between pages of the repository lead to the site's; what is no page becomes plain text."""
    source = next((path for path, own in PAGES.items() if own == page.file.src_uri), None)
    if source is None:
        return markdown

    def on_the_site(link: re.Match[str]) -> str:
        text, path, anchor = link.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = target if target.endswith(".md") else f"{target}/README.md"
        return f"[{text}]({PAGES[target]}{anchor})" if target in PAGES else text

    return _LINK.sub(on_the_site, markdown)
