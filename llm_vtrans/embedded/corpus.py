"""The text that every Python carries: pydoc's language topics and the stdlib's docstrings.

About one topic in eight is held out for evaluation. The topics quote each other at
length, so what keeps the held-out text unseen is a filter on paragraphs, not on topics.
"""

import ast
import hashlib
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HELDOUT_PERCENT = 12
SHORTEST_PARAGRAPH = 20  # characters; shorter ones ("Note:", "Example:") recur by nature

# Test fixtures, and the one-line docstrings of a hundred generated codecs.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "lib2to3", "encodings"})

_Documentable = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def training_documents() -> list[str]:
    """Return the training text, free of duplicated and of held-out paragraphs.

    Returns:
        One document per pydoc topic that is not held out, sorted by name, then one per
        stdlib module (all its docstrings), sorted by path. The list is shared: do not
        change it.
    """
    seen = {key for document in heldout_documents() for key in paragraph_keys(document)}
    topics = (text for name, text in _topics() if not _is_heldout(name))
    documents = (_unseen_part(text, seen) for text in (*topics, *_module_docstrings()))
    return [document for document in documents if document]


@cache
def heldout_documents() -> list[str]:
    """Return the held-out pydoc topics, whole, sorted by name.

    A hash of the name picks them, so every version of Python holds out the same ones.
    The list is shared: do not change it.
    """
    return list(dict.fromkeys(text for name, text in _topics() if _is_heldout(name)))


def paragraph_keys(document: str) -> Iterator[str]:
    """Yield the whitespace-normalised paragraphs long enough to identify their source."""
    for paragraph in _paragraphs(document):
        key = _key(paragraph)
        if len(key) > SHORTEST_PARAGRAPH:
            yield key


def _topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return sorted((name, text.strip()) for name, text in topics.items())


def _is_heldout(topic: str) -> bool:
    digest = hashlib.sha256(topic.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT


def _paragraphs(document: str) -> Iterator[str]:
    lines: list[str] = []
    for line in (*document.splitlines(), ""):
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _unseen_part(document: str, seen: set[str]) -> str:
    """Drop the paragraphs of `document` that are in `seen`, and add the others to it."""
    kept = []
    for paragraph in _paragraphs(document):
        key = _key(paragraph)
        if key not in seen:
            kept.append(paragraph)
        if len(key) > SHORTEST_PARAGRAPH:
            seen.add(key)
    return "\n\n".join(kept)


def _module_docstrings() -> Iterator[str]:
    """Yield the docstrings of each stdlib module, joined by blank lines."""
    for path in _stdlib_sources():
        docstrings = "\n\n".join(_docstrings(path))
        if docstrings:
            yield docstrings


def _stdlib_sources() -> list[Path]:
    sources: list[Path] = []
    for folder, children, files in os.walk(sysconfig.get_path("stdlib")):
        # A name that is no identifier (site-packages, config-3.x-...) is no stdlib package.
        children[:] = (c for c in children if c.isidentifier() and c not in _SKIPPED_FOLDERS)
        sources += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(sources)


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings in one source file; none if the file cannot be parsed."""
    try:
        with tokenize.open(path) as source, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source.read())
    except (OSError, SyntaxError, ValueError):
        return []
    texts = (ast.get_docstring(node) for node in _documentable(tree))
    return [text for text in texts if text]


def _documentable(node: ast.AST) -> Iterator[_Documentable]:
    """Yield `node` and all below it that may have a docstring, in source order."""
    if isinstance(node, _Documentable):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # expressions, most of the tree, hold none
            yield from _documentable(child)
