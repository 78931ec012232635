"""Hooks of mkdocs.yml: pages that live beside the code join the site, and links follow them.

A link to a page goes to its place on the site, one to a picture or a page of docs/ stays, and one
to code keeps its words only.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Page of the checkout: page of the site.
PAGES = {
    "README.md": "index.md",
    "bench/README.md": "benchmarks.md",
    "csrc/README.md": "cpu.md",
    "csrc/cuda/README.md": "hopper.md",
    "kernels/README.md": "triton.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files, config):
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites relative links from where the text stands in the checkout."""
    at = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(at, f"docs/{at}"))

    def moved(link: re.Match) -> str:
        picture, words, target, anchor = link.groups()
        if "://" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        place = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(place) is None or (place == path and path not in PAGES):
            return words
        relative = posixpath.relpath(place, posixpath.dirname(at) or ".")
        return f"{picture}[{words}]({relative}{anchor or ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)
