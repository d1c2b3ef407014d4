"""Captions before a text encoder reads them: the cleaning that published text-conditional training used, and a mending one.

LlamaGen's text-conditional models saw captions through the cleaning of DeepFloyd IF's T5 embedder, applied twice.  The tables
below state its rules; `tests/golden/captions.json` holds what it gives.  It lowers the case and removes signs before ftfy looks,
so that ftfy finds little left to mend ("cafÃ©" loses its © and becomes "cafã"): `mended` lets ftfy go first.
"""

import html
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
_SIGNS = "#®•©™&@·º½¾¿¡§~)(][}{|\\/*"


class Rule(NamedTuple):
    """What one rule looks for, and what it puts there."""

    pattern: re.Pattern[str]
    replacement: str


def _link(scheme: str) -> str:
    """A scheme with its slashes, or a name that ends in a known domain, with its path but not before an @."""
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@))"


def _rules(*rows: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(re.compile(pattern), replacement) for pattern, replacement in rows)


# Each table in the order of the published cleaning: a rule sees what those before it left.
_BEFORE_MARKUP = _rules(
    ("<person>", "person"),                  # the blanked names of Conceptual Captions, which the parser would take for markup
    (_link("https?"), ""),
    (_link("www"), ""),
)
_BEFORE_MENDING = _rules(
    (r"@\w+\b", ""),                         # a nickname
    ("[\u31c0-\u9fff]+", ""),                # CJK, from strokes to ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),       # an IP address
    (r"\d:\d\d\s+$", ""),                    # an article's time
    (r"\\n", " "),                           # a line end that was written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),                     # an article's number
    (rf"\S+\.(?:{_FILES})", ""),             # a file's name
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{re.escape(_SIGNS)}]+", " "),
    (r"\s+\.\s+", " "),
)
_AFTER_MENDING = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),      # names of goods: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*(?:[a-zA-Z]+\d+){2}[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),    # a size in pixels: Latin x, Cyrillic х, the sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),       # the whole in quotes
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINT = re.compile("[-_]")  # joins the words of a-file-name, where there are more of them than a sentence has


def _applied(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    with warnings.catch_warnings(action="ignore", category=MarkupResemblesLocatorWarning):
        return BeautifulSoup(text, features="html.parser").text


def _cleaned_once(text: str) -> str:
    text = _applied(_BEFORE_MARKUP, unquote_plus(text).strip().lower())
    text = _applied(_BEFORE_MENDING, _without_markup(text))
    if len(_JOINT.findall(text)) > 3:
        text = _JOINT.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _applied(_AFTER_MENDING, text).strip()


def clean_caption(text: str) -> str:
    """A caption as published text-conditional training cleaned it: lower case, without links, markup, file names and signs.

    text: any.  Returns one line, perhaps empty.  Applied twice, as DeepFloyd IF's T5 embedder and LlamaGen do.
    """
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, as JSON may hold, is no character
    return _cleaned_once(_cleaned_once(text))


def mend_caption(text: str) -> str:
    """`clean_caption` of what ftfy has mended, so that "cafÃ©" becomes "café" before its signs are removed."""
    return clean_caption(ftfy.fix_text(text))


CLEANING: dict[str, Callable[[str], str]] = {
    "published": clean_caption,
    "mended": mend_caption,
    "none": lambda text: " ".join(text.split()),
}


def first_sentence(text: str) -> str:
    """A caption up to its first full stop, LlamaGen's short caption."""
    return text.partition(".")[0]
