"""A web page in one file: elements whose text is escaped, pictures and downloads as data, and one look for all."""

from __future__ import annotations

import base64
import html
import io
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

STYLE = Path(__file__).with_name("report.css")
HEAVY = 150_000  # bytes: a larger picture is shrunk, so that a page of sixty can still be mailed
WIDEST = 1_000  # pixels of a shrunk picture
PIXEL_ART = 256  # pixels of width below which a picture is enlarged without blur
# Nothing is fetched and nothing runs, whatever the texts of the record hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Markup. Any other text is escaped where it is put into an element."""


def element(name: str, /, *content: object, **attributes: object) -> Html:
    """`<name …>content</name>`; a trailing underscore of an attribute's name is left out, as in `class_`.

    >>> element("p", "1 < 2", element("br"), class_="note")
    '<p class="note">1 &lt; 2<br></p>'
    """
    given = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    inside = "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content)
    return Html(f"<{name}{given}>" if name in ("br", "img", "meta") else f"<{name}{given}>{inside}</{name}>")


def section(title: str, *content: object) -> Html:
    """Under a heading; nothing where there is no content."""
    return element("section", element("h2", title), *content) if any(content) else Html()


def bullets(items: Iterable[object], at_most: int | None = None) -> Html:
    every = list(items)
    shown = every[:at_most]
    more = [f"and {len(every) - len(shown)} more"] if len(every) > len(shown) else []
    return element("ul", *(element("li", item) for item in [*shown, *more])) if every else Html()


def listed(entries: Mapping[str, object]) -> Html:
    """Names and what they stand for; those that stand for nothing are left out."""
    pairs = [part for name, text in entries.items() if text for part in (element("dt", name), element("dd", text))]
    return element("dl", *pairs) if pairs else Html()


def table(head: Sequence[str], rows: Iterable[Sequence[object]], marked: Sequence[int] = ()) -> Html:
    """Scrolls inside its own box where it is too wide. `marked`: indices of rows that stand out."""
    body = [
        element("tr", *(element("td", cell) for cell in row), **({"class": "marked"} if i in marked else {}))
        for i, row in enumerate(rows)
    ]
    top = element("thead", element("tr", *(element("th", name, scope="col") for name in head)))
    return element("div", element("table", top, element("tbody", *body)), class_="scroll")


def picture(data: bytes, alt: str, scale: float = 1.0) -> Html:
    """Loaded when it comes into view; `scale` is of its own size to that on the page."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if len(data) > HEAVY and image.format == "PNG":
            image.thumbnail((WIDEST, WIDEST * 10))
            shrunk = io.BytesIO()
            image.save(shrunk, "webp", quality=85)
            data = min(data, shrunk.getvalue(), key=len)
        kind = "png" if data.startswith(b"\x89PNG") else "webp"
    look = {"class": "pixels"} if width < PIXEL_ART else {}
    size = {"width": round(scale * width), "height": round(scale * height)}
    return element("img", src=_data_uri(data, f"image/{kind}"), alt=alt, loading="lazy", **size, **look)


def download(path: Path) -> Html:
    """A link that saves the file, which is inside the page."""
    kind = mimetypes.guess_type(path.name)[0] or "text/plain"
    return element("a", path.name, href=_data_uri(path.read_bytes(), kind), download=path.name)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def page(title: str, *content: object) -> str:
    """The whole file."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{element('html', head, element('body', element('main', *content)), lang='en')}\n"
