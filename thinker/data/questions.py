"""`stdlib-qa`: questions about this Python's standard library, answered by the first sentence of each docstring.

"What does shutil.copytree do?" — "Recursively copy a directory tree and return the destination directory." The source
files are parsed, never imported, so nothing of them runs. How conversations are checked, split and packed is the
business of `chats.py` and `packing.py`.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from .reading import file_state

MODULES = """
    abc argparse ast asyncio.events asyncio.locks asyncio.queues asyncio.streams asyncio.tasks base64 bisect bdb bz2
    calendar cmd code codecs collections colorsys concurrent.futures._base concurrent.futures.process
    concurrent.futures.thread configparser contextlib copy csv ctypes.util dataclasses datetime decimal difflib dis
    email.message email.parser email.utils enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt
    getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client http.cookies http.server imaplib
    importlib.abc importlib.util inspect ipaddress json json.decoder json.encoder keyword linecache locale
    logging logging.handlers lzma mailbox mimetypes multiprocessing.pool netrc ntpath numbers operator optparse os pdb
    pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats queue quopri random reprlib
    sched secrets selectors shelve shlex shutil smtplib socket socketserver sqlite3.dbapi2 ssl stat statistics string
    subprocess symtable sysconfig tarfile tempfile textwrap threading timeit token tokenize trace traceback tracemalloc
    types typing unittest.case unittest.loader unittest.mock unittest.suite urllib.parse urllib.request
    urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.util xml.dom.minidom xml.etree.ElementTree
    zipapp zipfile zipimport
"""
LONGEST_ANSWER = 160  # characters; what a docstring's first sentence says in more is left out


class StandardLibraryQuestions:
    """One question and answer for every public function, class and method that has a docstring of a sentence."""

    name = "stdlib-qa"

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Modules that this Python has, some being new or gone, or of another platform."""
        library = Path(sysconfig.get_paths()["stdlib"])
        found = {}
        for module in MODULES.split():
            place = library.joinpath(*module.split("."))
            for path in (place.with_name(place.name + ".py"), place / "__init__.py"):
                if path.is_file():
                    found[module] = path
                    break
        if len(found) < 50:
            raise ValueError(f"{self.name}: {library} holds {len(found)} of its modules: name other data with --data")
        return found

    def fingerprint(self) -> list[Any]:
        """What changes when the questions may have changed."""
        return [self.name, LONGEST_ANSWER, *([module, *file_state(path)] for module, path in self._files.items())]

    @cached_property
    def conversations(self) -> list[tuple[str, list[dict[str, str]]]]:
        """Where each question comes from, and the two messages. No question is asked twice."""
        found: dict[str, list[dict[str, str]]] = {}
        for module, path in self._files.items():
            for name, question, answer in questions(ast.parse(path.read_text(encoding="utf-8")), module):
                # What is defined once for each platform, say, is asked about once.
                found.setdefault(
                    f"{self.name}, {name}",
                    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                )
        return list(found.items())


def questions(tree: ast.Module | ast.ClassDef, inside: str) -> Iterator[tuple[str, str, str]]:
    """Name, question and answer for what is defined here and in its public classes."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{inside}.{node.name}"
        is_class = isinstance(node, ast.ClassDef)
        answer = first_sentence(ast.get_docstring(node) or "")
        if answer is not None:
            yield name, f"What is {name}?" if is_class else f"What does {name} do?", answer
        if isinstance(node, ast.ClassDef):
            yield from questions(node, name)


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph; None where there is none of a few words to `LONGEST_ANSWER`.

    "Return a list.  More" gives "Return a list."; "copy(x) -> y" is a signature, and no sentence.
    """
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"(])", paragraph, maxsplit=1)[0]
    if len(sentence) > LONGEST_ANSWER or len(sentence.split()) < 3 or "->" in sentence or not sentence[0].isupper():
        return None
    return sentence if sentence[-1] in ".!?" else sentence.rstrip(":;,") + "."


CHAT_SETS = {StandardLibraryQuestions.name: StandardLibraryQuestions()}
