"""What the documentation says, taken apart: pages, commands, Python, links, headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"<!-- needs: (.+) -->\n$")
MODULE = "voxtrast.engine.pretrain"


@dataclass(frozen=True)
class Script:
    page: Path
    text: str
    title: str  # file name, of what belongs to a tutorial
    needs: str  # what it cannot run without

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.page.read_text(encoding='utf-8').index(self.text)}"


def scripts() -> list[Script]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in FENCE.finditer(text):
            if block[2] == "python":
                needs = NEEDS.search(text, 0, block.start())
                found.append(Script(page, block[4], block[3] or "", needs[1] if needs else ""))
    return found


def commands(page: Path) -> list[str]:
    """The lines of indented blocks and of fences without a language, as one would type them."""
    text = FENCE.sub(
        lambda block: re.sub("^", "    ", block[4], flags=re.M) if block[2] in ("", "bash") else "",
        page.read_text(encoding="utf-8"),
    )
    lines = re.findall(r"^ {4,}((?:.*\\\n)*.+)", text, re.MULTILINE)
    return [re.sub(r"\\\n *", "", line) for line in lines]


def pretraining_words(command: str) -> list[str] | None:
    """Recipe and settings of a command that pretrains by a launcher; None for any other."""
    words = words_of(command)
    return words[words.index(MODULE) + 1 :] if MODULE in words else None


def words_of(command: str) -> list[str]:
    """Without comments, what follows behind `||` or `&&`, brackets around what may be left out, and dots."""
    words = shlex.split(re.split(r"\s(?:\|\||&&|#)\s", command)[0], posix=True)
    plain = []
    for word in words:
        if word.startswith("[-") or (word.endswith("]") and "[" not in word):
            word = word.strip("[]")
        if word not in ("...", "key=value"):
            plain.append(word.split("|")[0])
    return plain


def inline(page: Path) -> Iterator[list[str]]:
    """The words of `voxtrast ...` within sentences, which may stop anywhere."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for command in re.findall(r"`(voxtrast [a-z][^`]*)`", text):
        yield [word for word in re.sub(r"[\[\]]", " ", command).split() if word != "..."]


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith(("http:", "https:"))]


def anchors(page: Path) -> set[str]:
    """Of the headings, where GitHub and the site agree."""
    from markdown.extensions.toc import slugify

    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
        github = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        if github == slugify(plain, "-"):
            found.add(github)
    return found
