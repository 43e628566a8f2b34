"""The embedded source: the documentation of this Python installation, real English prose that is always there.

The language reference in `pydoc_data`, then the docstrings of the standard library and of installed packages. Sources
are read as text, never imported. Owns telling prose from code and markup; each paragraph comes once.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test"}
DOCSTRING = re.compile(r'(?:\A|:[ \t]*(?:#[^\n]*)?\n)\s*[rRuU]?"""(.*?)"""', re.DOTALL)
"""A triple-quoted string that opens a file, or follows a line that ends in a colon."""
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*)[^`]*`")
MARKUP = re.compile(r"`+|\*\*|_{2,}|\[`?|`?\]\([^)]*\)")
NOT_PROSE = re.compile(r">>>|\.\.\. |\.\. |:\w[\w ]*:|[-=~*#^+|]{3}|@|\$ |https?://\S+$|\w+:$")
"""How lines begin that are doctests, directives, fields, rules, tables, commands or headings."""
FEWEST_WORDS, PLAIN_SHARE = 6, 0.7
WORD = re.compile(r"[A-Za-z][a-z'-]*[a-z]|[aAI]")


def embedded_documents() -> Iterator[list[str]]:
    """Paragraphs of prose, one list for each reference topic and source file, in a fixed order."""
    seen: set[str] = set()
    for texts in _documentation():
        fresh = dict.fromkeys(paragraph for text in texts for paragraph in prose(text) if paragraph not in seen)
        seen.update(fresh)
        if fresh:
            yield list(fresh)


def _documentation() -> Iterator[list[str]]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for _, text in sorted(topics.items()):
        yield [text]
    paths = sysconfig.get_paths()
    for root in dict.fromkeys(Path(paths[kind]) for kind in ("stdlib", "purelib", "platlib")):
        for file in _python_files(root):
            yield DOCSTRING.findall(file.read_text(encoding="utf-8", errors="ignore"))


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def prose(text: str) -> Iterator[str]:
    """The paragraphs of a documentation text that read as English sentences, each joined to one line.

    A paragraph is a run of lines at one indentation or a hanging one. Those that look like code, fields, tables or
    lists of names are left out, and inline markup is taken off the others.
    """
    for block in re.split(r"\n\s*\n", text):
        for paragraph in _paragraphs(block):
            paragraph = MARKUP.sub("", ROLE.sub(r"\1", paragraph))
            if _is_prose(paragraph):
                yield paragraph


def _paragraphs(block: str) -> Iterator[str]:
    """Lines of a block joined, starting anew where the indentation changes or a line is not prose."""
    lines: list[str] = []
    indentation = -1
    for line in block.splitlines():
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        broken = NOT_PROSE.match(text) is not None
        if lines and (broken or (depth != indentation and len(lines) > 1)):
            yield " ".join(lines)
            lines = []
        if not broken and text:
            lines.append(text.lstrip("*-• "))
            indentation = depth
    if lines:
        yield " ".join(lines)


def _is_prose(paragraph: str) -> bool:
    """Enough words, and mostly plain ones."""
    tokens = paragraph.split()
    plain = sum(1 for token in tokens if WORD.fullmatch(token.strip(".,;:()\"'!?*[]")))
    return len(tokens) >= FEWEST_WORDS and plain >= PLAIN_SHARE * len(tokens)
