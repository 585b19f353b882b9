"""Text from tables and errors is escaped for terminals, Markdown, browsers and spreadsheets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sdpipeline import escaping
from sdpipeline.cli import output

HOSTILE = [
    "![x](http://evil.example/a.png)",
    "[text](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "http://evil.example",
    "www.evil.example",
    "someone@evil.example",
    "<http://evil.example>",
    "a | b \\| c \\\\| d",
    "`code` **bold** ~~gone~~ $x$ &lt;b&gt;",
    "line\n\n# heading\n| cell |",
    "\x1b]8;;http://evil.example\x1b\\link",
    "[^1]: note",
    "\u202egnp.exe",
]
every_hostile_text = pytest.mark.parametrize("text", HOSTILE)


class Tags(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, _: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(document: str) -> Iterator[Tags]:
    """The document rendered by two Markdown dialects."""
    for renderer in (MarkdownIt("commonmark"), MarkdownIt("gfm-like", {"linkify": False})):
        yield Tags(renderer.render(document))


def in_a_table(text: str) -> str:
    return f"| a | b |\n|---|---|\n| {escaping.markdown(text)} | last |\n"


def plain(text: str) -> str:
    return " ".join(text.split())


@every_hostile_text
def test_a_cell_of_a_markdown_table_is_text_in_every_dialect(text: str) -> None:
    for page in pages(in_a_table(text)):
        assert page.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
        if "table" in page.tags:
            assert plain(page.text).count("last") == 1
            assert plain(page.text) == plain(f"a b {escaping.terminal(plain(text))} last")


@given(text=st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_no_text_makes_a_tag(text: str) -> None:
    for page in pages(f"- **Name**: {escaping.markdown(text)}"):
        assert page.tags <= {"ul", "li", "strong", "p"}


@every_hostile_text
def test_an_address_is_not_made_a_link(text: str) -> None:
    assert not re.search(r"(https?|ftp)://|www\.|\w@\w|<|!\[|\]\(", escaping.markdown(text))


@given(text=st.text())
@settings(deadline=None)
def test_a_terminal_gets_no_control_characters(text: str) -> None:
    shown = escaping.terminal(text)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028]", shown)
    shown.encode()


def test_words_of_any_language_stay_as_they_are() -> None:
    for word in ("5\xa0000 €", "👩\u200d👧", "नि\u200dर", "naïve — “yes”", "猫"):
        assert escaping.terminal(word) == word


@given(value=st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3)))
@settings(deadline=None)
def test_a_json_document_is_the_same_and_harmless(value: object) -> None:
    text = escaping.json_document(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", text)


@pytest.mark.parametrize("cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", '=HYPERLINK("http://x")'])
def test_a_formula_becomes_text_in_a_spreadsheet(cell: str) -> None:
    assert escaping.spreadsheet(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["-1", "+4.5e3", "1,5", "a=b", "", 7, None, "C-001"])
def test_a_number_or_a_word_stays_in_a_spreadsheet(cell: object) -> None:
    assert escaping.spreadsheet(cell) == cell


def test_tables_and_sentences_show_codes_instead_of_obeying_them(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[31m[link=http://x]\x9b1m\u202e :smile:"
    output.print_table("", ("row",), [(hostile,)])
    output.stdout.print(hostile)
    assert capsys.readouterr().out.count(r"\x1b[31m[link=http://x]\x9b1m\u202e :smile:") == 2
