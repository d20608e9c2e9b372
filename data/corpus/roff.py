r"""What does a manual page say, as plain text?

Manual pages are roff: lines that begin with a dot are requests or macros, `\fB` and the like are
escapes inside a line. This is a reader, not a typesetter: it knows the man(7) and mdoc(7) macros
that carry text, turns the escapes that stand for characters into characters, and drops everything
about fonts, sizes, indentation, conditions and macro definitions. A paragraph becomes one line;
lines that the author kept apart (`.nf`, `.br`, tables) stay apart.
"""

import re
import unicodedata
from collections.abc import Iterator

_CHARACTERS = {
    "aq": "'", "cq": "\u2019", "oq": "\u2018", "dq": '"', "lq": "\u201c", "rq": "\u201d",
    "bu": "\u2022", "em": "\u2014", "en": "\u2013", "hy": "-", "mi": "-", "co": "\u00a9",
    "rg": "\u00ae", "tm": "\u2122", "ha": "^", "ti": "~", "ga": "`", "rs": "\\", "sl": "/",
    "ba": "|", "br": "|", "at": "@", "sh": "#", "Do": "$", "lC": "{", "rC": "}", "lB": "[",
    "rB": "]", "<=": "<=", ">=": ">=", "!=": "!=", "==": "==", "->": "->", "<-": "<-", "+-": "+/-",
    "mu": "x", "de": "\u00b0", "ct": "\u00a2", "Po": "\u00a3", "Eu": "\u20ac", "sc": "\u00a7",
    "ss": "\u00df", "fo": "<", "fc": ">", "la": "<", "ra": ">", "pl": "+", "eq": "=", "**": "*",
    "L\"": '"', "R\"": '"', "C'": "'", "C`": "`", "C+": "C++", "Aq": "'", "--": "--",
}  # fmt: skip
_STRINGS = {"R": "\u00ae", "Tm": "\u2122", "lq": '"', "rq": '"', **_CHARACTERS}

# No name in brackets is longer: a line of a million `\\[` would take hours to search for its end.
_ESCAPE = re.compile(
    r"""\\(?:
      (?P<comment>["\#].*)
    | \*(?:\((?P<string2>..)|\[(?P<stringn>[^\]]{0,80})\]|(?P<string1>.))
    | \((?P<char2>..)
    | \[(?P<charn>[^\]]{0,80})\]
    | C'(?P<charq>[^']*)'
    | [fgkmMnFV](?:\(..|\[[^\]]{0,80}\]|[+-]?.)
    | s(?:[+-]?\d|\([+-]?\d\d|[+-]?\[[^\]]{0,80}\]|[+-]?'[^']*')
    | [bDhHlLNoRSvwxXZA]'[^']*'
    | z.
    | (?P<plain>.)
    )?""",
    re.VERBOSE,
)
_PLAIN = {
    "-": "-",
    "e": "\\",
    "\\": "\\",
    " ": " ",
    "~": " ",
    "0": " ",
    ".": ".",
    "'": "'",
    "`": "`",
}

_FONT_MACROS = {"B", "I", "SM", "SB", "R", "CW", "C"}
_ALTERNATING = {"BR", "BI", "IB", "IR", "RB", "RI"}
_HEADINGS = {"SH", "SS", "Sh", "Ss", "TH"}
_PARAGRAPHS = {
    "PP",
    "LP",
    "P",
    "Pp",
    "sp",
    "RS",
    "RE",
    "Bl",
    "El",
    "Bd",
    "Ed",
    "TS",
    "TE",
    "D1",
    "Dl",
}
_TAGGED = {"TP", "TQ", "IP", "HP", "It", "br", "ti", "in"}
_KEEP_LINES = {"nf": True, "EX": True, "fi": False, "EE": False, "TS": True, "TE": False}
_ENCLOSED = {
    "Op": ("[", "]"), "Oo": ("[", ""), "Oc": ("", "]"), "Dq": ('"', '"'), "Sq": ("'", "'"),
    "Qq": ('"', '"'), "Pq": ("(", ")"), "Bq": ("[", "]"), "Aq": ("<", ">"), "Brq": ("{", "}"),
    "Ql": ("'", "'"), "Fn": ("", "()"), "Fl": ("-", ""), "Nd": ("- ", ""),
}  # fmt: skip
_MDOC_WORDS = {
    "Nm", "Ar", "Cm", "Ev", "Pa", "Va", "Vt", "Ft", "Fa", "Fd", "In", "Ic", "Li", "Em", "Sy",
    "Ad", "An", "Er", "Dv", "Tn", "Cd", "St", "Rv", "Ex", "Lk", "Mt", "Sx", "No", "Ns", "Xo",
    "Xc", "Ao", "Ac", "Bo", "Bc", "Do", "Dc", "Eo", "Ec", "Po", "Pc", "Qo", "Qc", "So", "Sc",
    "Bro", "Brc", "Xr", "At", "Bx", "Nx", "Fx", "Ox", "Ux", "Lb", "Rs", "Re", "%A", "%T", "%B",
    "%D", "%J", "%N", "%P", "%Q", "%R", "%V", "%O",
    *_ENCLOSED,
}  # fmt: skip
_TRUE_CONDITION = re.compile(r"^\.[ \t]*(?:if|ie)[ \t]+(?:n|!t|!'po4a'hide')[ \t]+(?!\\\{)")
_TABLE_CELL = re.compile(r"T\{\n|\nT\}")
_REQUEST = re.compile(r"^[.'][ \t]*([^ \t\\]*)[ \t]*(.*)$")


class _Page:
    """The text gathered so far, and what governs the lines to come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.words: list[str] = []
        self.keep_lines = False
        self.name = ""

    def add(self, text: str) -> None:
        """Add a line of text to the paragraph, or as a line of its own."""
        if self.keep_lines:
            self.lines.append(text.rstrip())
        elif not text.strip():
            self.end_paragraph()
        else:
            self.words.append(text.strip())

    def end_line(self) -> None:
        """End the line that is being gathered."""
        if self.words:
            self.lines.append(" ".join(self.words))
            self.words = []

    def end_paragraph(self) -> None:
        """End the line, and leave one empty line."""
        self.end_line()
        if self.lines and self.lines[-1]:
            self.lines.append("")


def plain_text(source: str) -> str:
    """Return the readable text of a manual page; empty for one that only points to another (`.so`).

    Args:
        source: the page as roff.
    """
    page = _Page()
    lines = iter(source.replace("\\\n", "").splitlines())
    for raw in lines:
        line = _TRUE_CONDITION.sub("", raw)
        found = _REQUEST.match(line) if line[:1] in {".", "'"} else None
        if found is None:
            page.add(unescape(line))
            continue
        name, rest = found.groups()
        if name == "so":
            return ""
        if name in {"de", "de1", "am", "ig"}:
            _skip_definition(lines, end="." + (rest.split()[1] if len(rest.split()) > 1 else "."))
        elif name in {"if", "ie", "el", "while"} or "\\{" in rest:
            _skip_condition(line, lines)
        elif name == "TS":
            _skip_table_format(lines)
            _apply(page, name, rest)
        elif name == "EQ":
            _skip_definition(lines, end=".EN")
        else:
            _apply(page, name, rest)
    page.end_line()
    text = _TABLE_CELL.sub("", "\n".join(page.lines))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n" if page.lines else ""


def unescape(text: str) -> str:
    """Return a line with its escapes resolved: characters kept, fonts and sizes dropped."""
    return _ESCAPE.sub(_character, text) if "\\" in text else text


def _character(found: re.Match[str]) -> str:
    """Return what an escape stands for; nothing for fonts, sizes, motions and comments."""
    string = found["string1"] or found["string2"] or found["stringn"]
    if string is not None:
        return _STRINGS.get(string, "")
    name = found["char2"] or found["charn"] or found["charq"]
    if name is not None:
        return _named_character(name)
    return _PLAIN.get(found["plain"] or "", "")


def _named_character(name: str) -> str:
    if re.fullmatch(r"u[0-9A-F]{4,6}", name):
        return chr(min(int(name[1:], 16), 0x10FFFF))
    if len(name) == 2 and name[0] in "'`^:~,":  # accented letters: \('e
        marks = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303"}
        letter = name[1] + marks.get(name[0], "\u0327") if name[1].isalpha() else ""
        return unicodedata.normalize("NFC", letter)
    return _CHARACTERS.get(name, "")


def _skip_definition(lines: Iterator[str], *, end: str) -> None:
    """Pass over lines up to the one that ends the block."""
    for line in lines:
        if line.replace(" ", "") == end or line.startswith(end + " "):
            return


def _skip_condition(line: str, lines: Iterator[str]) -> None:
    """Pass over a conditional request with its block; its text is for other devices or set-ups."""
    depth = line.count("\\{") - line.count("\\}")
    while depth > 0:
        following = next(lines, None)
        if following is None:
            return
        depth += following.count("\\{") - following.count("\\}")


def _skip_table_format(lines: Iterator[str]) -> None:
    """Pass over a table's options and column formats, which end with a full stop."""
    for line in lines:
        if line.rstrip().endswith("."):
            return


def _apply(page: _Page, name: str, rest: str) -> None:
    """Add what one macro says to the page."""
    words = _arguments(rest)
    if name in _KEEP_LINES:
        page.end_paragraph()
        page.keep_lines = _KEEP_LINES[name]
    elif name in _HEADINGS:
        page.keep_lines = False
        page.end_paragraph()
        heading = f"{words[0]}({words[1]})" if name == "TH" and len(words) > 1 else " ".join(words)
        page.lines.append(heading)
        if name == "TH":
            page.lines.append("")
    elif name in _PARAGRAPHS:
        page.end_paragraph()
        if name in {"D1", "Dl"} and words:
            page.lines.append(_mdoc(page, words))
    elif name in _TAGGED:
        page.end_line()
        if name == "It" and words:
            page.lines.append(_mdoc(page, words))
        elif name == "IP" and words and words[0]:
            page.words.append(words[0])
    elif name in _FONT_MACROS:
        page.add(" ".join(words))
    elif name in _ALTERNATING:
        page.add("".join(words))
    elif name in {"UR", "MT"} and words:
        page.add(f"<{words[0]}>")
    elif name == "Nm":
        page.name = words[0] if words and not page.name else page.name
        page.add(_mdoc(page, words) if words else page.name)
    elif name in _MDOC_WORDS:
        page.add(_mdoc(page, [name, *words]))


def _arguments(rest: str) -> list[str]:
    """Return a macro's arguments: split at blanks, quotes keep blanks together."""
    rest = re.sub(r"\\[\"#].*", "", rest)
    if '"' not in rest:
        return [unescape(word) for word in re.split(r"(?<!\\)[ \t]+", rest.strip()) if word]
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |[^\s"])+(?:"[^\s]*)?)', rest)
    return [unescape((quoted or bare).replace('""', '"')) for quoted, bare in found]


def _mdoc(page: _Page, words: list[str]) -> str:
    """Return an mdoc line as text: callable macros among the words are resolved."""
    parts: list[str] = []
    closing: list[str] = []
    joined = False  # the next word follows without a blank
    number = 0
    while number < len(words):
        word = words[number]
        number += 1
        if word == "Xr" and number + 1 < len(words):
            word = f"{words[number]}({words[number + 1]})"
            number += 2
        elif word in _ENCLOSED:
            opening, end = _ENCLOSED[word]
            parts.append(("" if joined else " ") + opening)
            closing.append(end)
            joined = True
            continue
        elif word in {"Ns", "Pf"}:
            joined = True
            continue
        elif word == "Nm" and (number == len(words) or words[number] in _MDOC_WORDS):
            word = page.name
        elif word in _MDOC_WORDS:
            continue
        blank = "" if joined or word in {".", ",", ";", ":", ")", "]"} else " "
        parts.append(blank + word)
        joined = word in {"(", "["}
    return ("".join(parts) + "".join(reversed(closing))).strip()
