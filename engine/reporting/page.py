"""One HTML file that needs nothing else: text, tables, and pictures inside the page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #59636e; --ground: #ffffff; --line: #d5dae0;
  --band: #f4f6f8; --note: #fff6dd; --note-line: #d9a514; --accent: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --faint: #9aa4af; --ground: #14171b; --line: #353b43;
  --band: #1d2127; --note: #332a10; --note-line: #b98d1c; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 60px; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 30px; margin: 8px 0 4px; } h2 { font-size: 22px; margin: 44px 0 8px; padding-top: 14px;
  border-top: 1px solid var(--line); } h3 { font-size: 17px; margin: 26px 0 6px; }
p { max-width: 82ch; margin: 8px 0; } .faint { color: var(--faint); }
figure { margin: 18px 0 24px; } figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
ul { max-width: 86ch; padding-left: 22px; } li { margin: 6px 0; }
figcaption { color: var(--faint); font-size: 14.5px; max-width: 100ch; margin-top: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 12px 0 18px; font-size: 15px; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
code, pre { font: 13.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--band); padding: 10px 12px; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { background: var(--note); border-left: 4px solid var(--note-line); padding: 8px 14px; margin: 14px 0;
  border-radius: 0 6px 6px 0; } .note p { margin: 4px 0; max-width: none; }
a { color: var(--accent); } nav a { margin-right: 16px; white-space: nowrap; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture as PNG, and where it has a light ground also the one to show on a dark page."""

    png: bytes
    dark_png: bytes | None = None


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[str]

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def draw(figure: Any, dots_per_inch: int = 100) -> bytes:
    """The PNG of a matplotlib figure, with as few colours as it needs to stay small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor=figure.get_facecolor())
    return buffer.getvalue()


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


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; cells that are numbers, or header cells above them, stand to the right."""
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if right[i] else ''}>{escape(str(value))}</{tag}>"
            for i, value in enumerate(values)
        )

    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _is_number(value: Any) -> bool:
    text = str(value).replace("%", "").replace("×", "").replace(",", "").split("±")[0].strip()
    if text in ("", "–"):
        return True
    try:
        float(text.split(" ")[0])
    except ValueError:
        return False
    return True


def figure(picture: Picture, caption: str, width: int | None = None) -> str:
    """A picture with its caption, which is also what a screen reader says."""
    image = (
        f'<img alt="{escape(caption)}" src="{_data(picture.png)}"'
        + (f' style="width:{width}px"' if width else "")
        + ">"
    )
    if picture.dark_png is not None:
        image = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(picture.dark_png)}">'
            f"{image}</picture>"
        )
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    contents = " ".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    body = "\n".join(
        f'<h2 id="{section.anchor}">{escape(section.title)}</h2>\n' + "\n".join(section.blocks) for section in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="faint">{escape(subtitle)}</p>\n<nav>{contents}</nav>\n{body}\n'
        "</body>\n</html>\n"
    )
