"""What the site needs beyond the pages: pictures of benchmarks, drawings of methods, and the package's sources."""

import hashlib
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\((?:\.\./)+benchmarks/results/([\w.-]+\.png)\)")
DRAWN = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """The namespace as links, which the reference of Python is read through; `make lint` makes the same."""
    folder = ROOT / ".typing" / "voxtrast"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("kernels", "methods", "engine", "benchmarks"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return config


def on_files(files: Any, config: Any) -> Any:
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    up = "../" * page.file.src_uri.count("/")
    markdown = OUTSIDE.sub(rf"({up}pictures/\1)", markdown)
    return DRAWN.sub(lambda block: _drawing(block[1], page), markdown)


def _drawing(source: str, page: Any) -> str:
    """The committed drawing of a diagram: mermaid itself would be fetched from a network by every reader."""
    picture = Path(page.file.abs_src_path).parent / "drawings" / f"{drawing_name(source)}.svg"
    if not picture.exists():
        raise PluginError(f"{page.file.src_uri}: a diagram changed; draw it by docs/methods/drawings/draw.sh")
    shown = f"![What {page.file.name} computes](drawings/{picture.name})"
    return f'<div class="drawing" markdown>[{shown}](drawings/{picture.name} "The drawing alone")</div>'


def drawing_name(source: str) -> str:
    """Changes with the diagram, so that an old drawing is never shown for a new one."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
