"""One HTML file that needs nothing else: text, tables, and pictures inside the page."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from ..errors import UserError

MARK = '<meta name="generator" content="voxtrast report">'  # tells our pages from other files

# A browser that reads it loads nothing from elsewhere, whatever the page says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


@dataclass(frozen=True)
class Picture:
    data: bytes
    kind: str = "png"  # png | jpeg | svg+xml

    @property
    def uri(self) -> str:
        return f"data:image/{self.kind};base64," + base64.b64encode(self.data).decode("ascii")


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[str]
    group: str = ""  # the run that it is about, where a page has several

    @property
    def heading(self) -> str:
        return f"{self.group}: {self.title}" if self.group else self.title


def draw(figure: Any, dots_per_inch: int = 100) -> bytes:
    """The PNG of a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def guarded(build: Callable[[], list[str]], what: str, left_out: list[str]) -> list[str]:
    """The blocks, or a note in their place: a page about a half-written run shows what there is.

    Args:
        what: the name of the part.
        left_out: gets a line where the part could not be made.
    """
    try:
        return build()
    except UserError as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        named = {"PIL": "pillow"}.get(name, name)
        extra = "pip install 'voxtrast[report]'" if name in ("matplotlib", "PIL") else f"pip install {named}"
        reason = f"{named} is not installed, and pictures are drawn with it; {extra}"
    except Exception as error:  # a page without one part is worth more than none
        reason = f"{type(error).__name__}: {str(error) or 'no message'}"
    left_out.append(f"{what}: {reason}")
    return [note(f"Left out: {reason.rstrip('.')}.")]


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def faint(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def note(*lines: str) -> str:
    return '<div class="note">' + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</div>"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def folded(summary: str, *blocks: str) -> str:
    """Blocks that are shown when the reader asks for them; no script is needed."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(blocks)}</details>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; cells that are numbers, or header cells above them, stand to the right.

    Without a header the first cell of each row names it.
    """
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    named = any(header)

    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if right[i] else ''}>{escape(str(value))}</{tag}>"
            for i, value in enumerate(values)
        )

    def row(values: Sequence[Any]) -> str:
        if named:
            return cells(values, "td")
        return f'<th scope="row">{escape(str(values[0]))}</th>' + "".join(
            f"<td>{escape(str(value))}</td>" for value in values[1:]
        )

    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if named else ""
    body = "".join(f"<tr>{row(values)}</tr>" for values in rows)
    # Reached by keyboard, so that it can be scrolled without a pointer.
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def _is_number(value: Any) -> bool:
    text = str(value).replace("%", "").replace("×", "").replace(",", "").split("±")[0].strip()
    if text in ("", "–"):
        return True
    try:
        float(text.split(" ")[0])
    except ValueError:
        return False
    return True


def image(picture: Picture, alt: str, style: str = "") -> str:
    styled = f' style="{style}"' if style else ""
    return f'<img alt="{escape(alt)}" src="{picture.uri}"{styled}>'


def figure(picture: Picture, caption: str, *, alt: str = "", least_px: int = 0, width_px: int = 0) -> str:
    """A picture with its caption.

    Args:
        alt: what a screen reader says; default the caption.
        least_px: on a screen narrower than this the picture is scrolled sideways in place of shrinking further.
        width_px: no wider than this.
    """
    sizes = [f"min-width:{least_px}px"] * bool(least_px) + [f"width:{width_px}px"] * bool(width_px)
    shown = image(picture, alt or caption, ";".join(sizes))
    if least_px:
        shown = f'<div class="scroll" tabindex="0">{shown}</div>'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def grid(figures: Sequence[str]) -> str:
    """As many figures side by side as the screen has room for."""
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def colour_key(low: str, high: str, colours: Sequence[str]) -> str:
    """A bar of colours between the values of its ends."""
    bar = f'<span class="bar" style="background:linear-gradient(to right,{",".join(colours)})"></span>'
    return f'<p class="key"><span>{escape(low)}</span>{bar}<span>{escape(high)}</span></p>'


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    anchors = _anchors([section.heading for section in sections])
    groups: dict[str, list[str]] = {}
    for section, anchor in zip(sections, anchors, strict=True):
        groups.setdefault(section.group, []).append(f'<a href="#{anchor}">{escape(section.title)}</a>')
    contents = "".join(
        f"<p>{f'<strong>{escape(group)}</strong> ' if group else ''}{' '.join(links)}</p>"
        for group, links in groups.items()
    )
    body = "\n".join(
        f'<section>\n<h2 id="{anchor}">{escape(section.heading)}</h2>\n' + "\n".join(section.blocks) + "\n</section>"
        for section, anchor in zip(sections, anchors, strict=True)
    )
    own = files("voxtrast.engine") / "reporting"
    style, script = ((own / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<header>\n"
        f'<h1>{escape(title)}</h1>\n<p class="faint">{escape(subtitle)}</p>\n'
        f'<nav aria-label="Contents">{contents}</nav>\n</header>\n<main>\n{body}\n</main>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _anchors(headings: Sequence[str]) -> list[str]:
    """A name for each, no two alike."""
    anchors: list[str] = []
    for words in headings:
        plain = "".join(c if c.isalnum() and c.isascii() else "-" for c in words.lower()).strip("-") or "section"
        anchor, number = plain, 1
        while anchor in anchors:
            number += 1
            anchor = f"{plain}-{number}"
        anchors.append(anchor)
    return anchors
