"""Writes the generated parts of docs/: the table of keys in docs/configuration.md.

Run by ``make docs``; a test tells when it should have been.
"""

from __future__ import annotations

from pathlib import Path

from stratabox.daemon.config.keys import markdown_table

BEGIN = "<!-- keys: begin (make docs) -->\n"
END = "<!-- keys: end -->\n"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def updated(page: str) -> str:
    """Give the page's text with the table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{markdown_table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
