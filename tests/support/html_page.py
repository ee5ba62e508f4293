"""A strict reader of HTML pages, for the tests of the pages that people read."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta"}
SELF_CLOSING = {"rect", "line"}
HOSTILE = """</style><script>alert("1")</script> & '$title' {{ name }} {% raw %} <img src=x onerror=a()>"""


class Page(HTMLParser):
    """Gathers text and elements; fails if an element is not closed or a cell has another column's label."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.heads: list[str] = []  # of the table that is open
        self.labels: list[str | None] = []  # of its last row
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "thead":
            self.heads = []
        elif tag == "tr":
            self.labels = []
        elif tag == "th" and "thead" in self.open:
            self.heads.append("")
        elif tag == "td":
            self.labels.append(dict(attrs).get("data-label"))

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSING, f"HTML does not let <{tag}/> close itself"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag == "tr" and "tbody" in self.open:
            assert self.labels == self.heads[1:]

    def handle_data(self, data):
        if self.open[-2:] == ["tr", "th"] and "thead" in self.open:
            self.heads[-1] += data
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """What is read, with plain signs for the typographic ones."""
        signs = str.maketrans({0xA0: " ", 0xD7: "x", 0x2013: "-", 0x2212: "-"})
        return " ".join(" ".join(self.words).translate(signs).split())

    def of_class(self, tag: str, name: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and name in (a.get("class") or "").split()]


def percent(value: str | None) -> float:
    assert value is not None
    assert value.endswith("%")
    return float(value[:-1])
