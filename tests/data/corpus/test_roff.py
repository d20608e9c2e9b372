"""Manual pages as text: pages written for the purpose, one for each dialect."""

import pytest

from data.corpus.roff import plain_text, unescape

MAN = r""".\" a comment
.TH LS 1 "September 2022" "GNU coreutils"
.de Vb
.nf
..
.if t .ds x y
.ie \n(.g \{\
.  ds nothing here
.\}
.el \{\
.  ds nor here
.\}
.SH NAME
ls \- list \fIdirectory\fR contents
.SH OPTIONS
.TP
.BR \-a ", " \-\-all
do not ignore
entries starting with .\&
.TP
.if !'po4a'hide' .B \-b
.I FILE
.PP
Second\(emparagraph, \(lqquoted\(rq; 50\\% \*(Aqx\*(Aq \s-1SMALL\s0.
.nf
  kept
    as is
.fi
.TS
tab(|);
l l.
a	T{
b
T}
.TE
"""
MDOC = r""".Dd June 1, 2020
.Dt CAT 1
.Sh NAME
.Nm cat
.Nd concatenate files
.Sh SYNOPSIS
.Nm
.Op Fl u
.Op Ar
.Sh DESCRIPTION
.Bl -tag -width x
.It Fl u Ar size
See
.Xr cp 1 ,
or
.Dq stdin .
.El
"""


def test_a_page_of_man_macros_becomes_readable_text() -> None:
    assert plain_text(MAN) == (
        "LS(1)\n\nNAME\nls - list directory contents\n\nOPTIONS\n"
        "-a, --all do not ignore entries starting with .\n-b FILE\n\n"
        "Second\u2014paragraph, \u201cquoted\u201d; 50\\% 'x' SMALL.\n\n"
        "  kept\n    as is\n\na\tb\n"
    )


def test_a_page_of_mdoc_macros_becomes_readable_text() -> None:
    text = plain_text(MDOC)

    assert "NAME\ncat - concatenate files" in text
    assert "-u size" in text
    assert "See cp(1), or" in text
    assert ".Nm" not in text


def test_a_redirection_has_no_text() -> None:
    assert plain_text(".so man1/gzip.1\n") == ""
    assert plain_text("") == ""


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"\fBbold\fP \f[CW]code\f[]", "bold code"),
        (r"a\-b\e\\", r"a-b\\"),
        (r"x\|y\^z\&!\%", "xyz!"),
        (r"\[u201C]hi\[u201D] \(co \[bu]", "\u201chi\u201d \u00a9 \u2022"),
        (r"\h'1i'w\v'-1'\w'abc'u", "wu"),
        (r"caf\('e", "caf\u00e9"),
        (r"text \" comment", "text "),
        ("\uba85\ub839 \\fI\uc0ac\uc6a9\\fR", "\uba85\ub839 \uc0ac\uc6a9"),
        ("\\", ""),
    ],
)
def test_escapes_become_characters_or_nothing(escaped: str, text: str) -> None:
    assert unescape(escaped) == text
