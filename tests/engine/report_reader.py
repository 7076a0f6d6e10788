"""Reads a report as a browser would, and complains about what a page may not be."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "input"}
Attributes = dict[str, str]


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.all: list[tuple[str, Attributes]] = []
        self.words: list[str] = []
        self.headings: list[tuple[int, str]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        self.all.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] in ("script", "style"):
            return
        self.words.append(data)
        if re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def tags(self, name: str) -> list[Attributes]:
        return [attributes for tag, attributes in self.all if tag == name]

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def titles(self) -> list[str]:
        return [words for level, words in self.headings if level == 2]


def read_page(path: Path) -> Reader:
    """The page, after what holds for every one of them."""
    reader = Reader()
    text = path.read_text(encoding="utf-8")
    reader.feed(text)
    assert not reader.open
    links = [each[name] for _, each in reader.all for name in ("src", "srcset", "href", "action") if name in each]
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "@import" not in text
    assert "url(" not in text
    for image in reader.tags("img"):
        assert image["src"].startswith("data:image/")
        assert image["alt"].strip()
    names = [each["id"] for _, each in reader.all if "id" in each]
    assert len(set(names)) == len(names)
    assert {link["href"].removeprefix("#") for link in reader.tags("a")} <= set(names)
    levels = [level for level, _ in reader.headings]
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert levels.count(1) == 1
    [script] = reader.tags("script")
    assert not script
    about = {each["name"]: each["content"] for each in reader.tags("meta") if "name" in each}
    assert about["viewport"].startswith("width=device-width")
    assert about["generator"] == "voxtrast report"
    [policy] = [each["content"] for each in reader.tags("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'; img-src data:;")
    return reader
