"""A table in words and digits, for the terminal, for GitHub and for LaTeX."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

NONE = "–"
TERMINAL_WIDTH = 120


@dataclass(frozen=True)
class Text:
    """What is shown: under the title what must be read first, then the rows, then notes."""

    title: str
    lead: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone and are aligned at the right; the last one holds marks."""
        number = re.compile(rf"[\d.,e]+|inf|{NONE}|\d.*[±†)]")
        columns = list(zip(*self.rows, strict=True))
        return [all(number.fullmatch(cell) for cell in column) for column in columns[:-1]] + [False]


def plain(text: Text) -> str:
    """For the terminal: the table as it is, notes in lines."""
    top = [text.title, *([text.lead] if text.lead else [])]
    notes = [textwrap.fill(note, TERMINAL_WIDTH, subsequent_indent="  ") for note in text.notes]
    return "\n".join([*top, "", *_grid(text.head, text.rows, text.numeric), "", *notes])


def markdown(text: Text) -> str:
    """For GitHub."""
    top = [f"**{_markdown(text.title)}**", "", *([_markdown(text.lead), ""] if text.lead else [])]
    escaped = [[_markdown(cell) for cell in row] for row in [text.head, *text.rows]]
    notes = [f"- {_markdown(note)}" for note in text.notes]
    return "\n".join([*top, *_grid(escaped[0], escaped[1:], text.numeric), "", *notes, ""])


def _grid(head: list[str], rows: list[list[str]], numeric: list[bool]) -> list[str]:
    """The lines of a markdown table with its columns aligned, so that it also reads as it is."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        aligned = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)]
    return [line(head), line(rule), *map(line, rows)]


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*`<\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "–": "--", "×": r"$\times$", "±": r"$\pm$", "²": r"$^2$",
    "≤": r"$\le$", "≥": r"$\ge$", "≈": r"$\approx$", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    "†": r"\textdagger{}", "…": r"\ldots{}", "σ": r"$\sigma$", "τ": r"$\tau$", "λ": r"$\lambda$", "ε": r"$\epsilon$",
}  # fmt: skip


def latex(text: Text) -> str:
    """A float with a booktabs table, a rule where the first column changes, and the notes below."""
    body: list[str] = []
    for i, row in enumerate(text.rows):
        if i and row[0] != text.rows[i - 1][0]:
            body.append(r"\midrule")
        body.append(" & ".join(map(_latex, row)) + r" \\")
    caption = f"{text.title}. {text.lead}" if text.lead else text.title
    return "\n".join(
        [
            r"% \usepackage[T1]{fontenc} \usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(caption)}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for n in text.numeric)}}}",
            r"\toprule",
            " & ".join(map(_latex, text.head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\medskip\raggedright\scriptsize",
            *(_latex(note) + r"\par" for note in text.notes),
            r"\end{table}",
            "",
        ]
    )


def _latex(text: str) -> str:
    """Escaped; a letter that pdflatex may lack is given by its code point."""
    return "".join(LATEX.get(c) or (c if ord(c) < 0x180 and c.isprintable() else f"(U+{ord(c):04X})") for c in text)
