"""Where text comes from: what is held out, how files are read in pieces, how sets are fetched, and what is refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import sys
import sysconfig
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from thinker.data import reading
from thinker.data.chats import open_chats
from thinker.data.named import EVALUATION_SETS, TRAINING_SETS, NamedSet, StandardLibrary
from thinker.data.reading import PIECE, Document
from thinker.data.shards import prepare
from thinker.data.sources import open_evaluation, open_sources
from thinker.data.split import Split, held_out
from thinker.places import cache_folder

REAL_DATA = os.environ.get("THINKER_DATA")


def text_of(document: Document) -> str:
    return "".join(document.read())


def both_sides(*values: object) -> tuple[list[str], list[str]]:
    """The training and the held-out documents of what is given, as texts."""
    opened = open_sources([str(value) for value in values])
    train, valid = (list(map(text_of, opened.documents(split))) for split in ("train", "valid"))
    return train, valid


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, nor real data unless it asks for it."""
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("THINKER_DATA", raising=False)


# What is held out


def test_the_hash_stays() -> None:
    """Another hash would move files between the sides, and a resumed run would be tested on what it learnt."""
    assert [name for name in (f"{i}.py" for i in range(100)) if held_out(name)] == ["10.py", "12.py", "76.py", "93.py"]


def test_the_hash_takes_one_in_25() -> None:
    """A skewed hash holds out too little to measure, or too much to learn. Binomial: 400 ± 5 standard deviations."""
    assert abs(sum(held_out(str(i)) for i in range(10_000)) - 400) < 5 * (400 * 0.96) ** 0.5


def test_standard_library() -> None:
    """Tests in the corpus, files on both sides, or an order that varies between machines would spoil the demo."""
    library = StandardLibrary()
    train, valid = (list(library.documents(split)) for split in ("train", "valid"))
    names = {document.key for document in train + valid}
    assert len(names) == len(train) + len(valid) > 400
    assert {"argparse.py", "json/decoder.py", "encodings/cp037.py"} <= names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    assert 0.02 < len(valid) / len(names) < 0.07
    assert library.size() == sum(document.size for document in train + valid) > 5_000_000
    assert [document.key.split("/") for document in train] == sorted(document.key.split("/") for document in train)
    argparse = next(document for document in train + valid if document.key == "argparse.py")
    assert text_of(argparse).encode() == Path(sys.modules["argparse"].__file__).read_bytes()


def test_standard_library_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without its source must be told from an empty corpus."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"stdlib: .* holds 0 source files.*--data"):
        StandardLibrary().fingerprint()


def test_one_file_ends_held_out(tmp_path: Path) -> None:
    """A file cut in the middle of a line, or with text on neither or both sides, gives a wrong held-out loss."""
    lines = [f"line {i} of a text, with é in it\n" for i in range(20_000)]
    path = write(tmp_path / "book.txt", "".join(lines))
    (train,), (valid,) = both_sides(path)
    assert train + valid == "".join(lines)
    assert train.endswith("\n")
    assert len(valid.encode()) == pytest.approx(0.05 * path.stat().st_size, abs=100)


def test_a_tiny_file_still_has_two_sides(tmp_path: Path) -> None:
    """A beginner's first file of one sentence must not end in an empty training or held-out side."""
    for text in ("Hello, world!", "first\nsecond\n", "ab", "日本語のテキスト" * 3):
        (train,), (valid,) = both_sides(write(tmp_path / "a.txt", text))
        assert train
        assert valid
        assert train + valid == text


def test_a_few_files_end_held_out(tmp_path: Path) -> None:
    """Three files can't be split by a hash, which would often hold out none or most: the end of the last one is."""
    texts = {name: f"{name} has a line of text\n" * 400 for name in ("a.txt", "b.md", "sub/c.py")}
    for name, text in texts.items():
        write(tmp_path / "own" / name, text)
    train, valid = both_sides(tmp_path / "own")
    assert train[:2] == [texts["a.txt"], texts["b.md"]]
    assert (len(train), len(valid)) == (3, 1)
    assert train[2] + valid[0] == texts["sub/c.py"]


def test_a_file_that_begins_where_the_rest_is_held_out(tmp_path: Path) -> None:
    """Off by one at the border between two files: one of them on the wrong side, or on both."""
    names = [name for name in (f"{i:02}.txt" for i in range(30)) if not held_out(name)][:20]
    for name in names:
        write(tmp_path / "own" / name, f"{name} and no more\n")
    train, valid = both_sides(tmp_path / "own")
    assert train == [f"{name} and no more\n" for name in names[:19]]
    assert valid == [f"{names[19]} and no more\n"]


def test_a_hash_that_takes_too_much_is_not_followed(tmp_path: Path) -> None:
    """One huge file that the hash holds out would leave next to nothing to learn from."""
    assert held_out("10.py")
    for i in range(50):
        write(tmp_path / "own" / f"{i}.py", f"number = {i}\n" * (5000 if i == 10 else 10))
    train, valid = both_sides(tmp_path / "own")
    held = len("".join(valid)) / len("".join(train + valid))
    assert 0.04 < held < 0.06


def test_no_cut_loses_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and the border of the held-out part may meet in any way; no character may be lost or doubled."""
    monkeypatch.setattr(reading, "PIECE", 16)
    for length in range(2, 200):
        text = "".join("\n" if i % 7 == 3 or i % 11 == 5 else "aé中🙂"[i % 4] for i in range(length))
        (train,), (valid,) = both_sides(write(tmp_path / "a.txt", text))
        assert train + valid == text


def test_many_files_are_held_out_by_hash(tmp_path: Path) -> None:
    """A file that changes sides because another one was added makes two runs incomparable."""
    for i in range(200):
        write(tmp_path / "own" / f"{i}.py", f"number = {i}\n")
    train, valid = both_sides(tmp_path / "own")
    assert len(train) + len(valid) == len({*train, *valid}) == 200
    assert set(valid) == {f"number = {i}\n" for i in range(200) if held_out(f"{i}.py")}
    write(tmp_path / "own" / "more.py", "number = None\n")
    assert both_sides(tmp_path / "own")[1] == valid


def test_repeated_rows_have_one_side(tmp_path: Path) -> None:
    """The same story in training and held out would measure memory instead of learning."""
    rows = [{"text": f"story {i % 300}"} for i in range(900)]
    train, valid = both_sides(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))))
    assert len(train) + len(valid) == 900
    assert valid
    assert not set(train) & set(valid)


# Reading


def test_pieces_are_bounded_and_whole(tmp_path: Path) -> None:
    """A big file read at once would need memory of its size; a lost or doubled piece would go unnoticed."""
    text = "".join(f"def f{i}():\n    '''é 中 🙂'''\n\n    return {i}\n" for i in range(30_000)) + "x" * 3 * PIECE
    (document,) = open_evaluation(str(write(tmp_path / "big.py", text)))
    pieces = list(document.read())
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= PIECE
    assert len(pieces) > 4
    assert "".join(document.read()) == text  # and once more from the beginning


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    """Bytes are what bits per byte divides by, so line ends stay; a byte-order mark is no text."""
    (document,) = open_evaluation(str(write(tmp_path / "dos.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")))
    assert text_of(document) == "one\r\ntwo\rthree\n"


@pytest.mark.parametrize("before", [0, 5, PIECE - 1, PIECE + 7])
def test_not_utf8(tmp_path: Path, before: int) -> None:
    """A Latin-1 file must be named with the place, also beyond the first piece and at the very end."""
    path = write(tmp_path / "latin.txt", b"x" * before + "é and more".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"latin\.txt: not UTF-8 \(0xe9 at byte {before}\): save it as UTF-8"):
        both_sides(path)
    write(path, b"x" * before + "é".encode()[:1])
    with pytest.raises(ValueError, match=rf"not UTF-8 \(0xc3 at byte {before}\)"):
        list(map(text_of, open_evaluation(str(path))))


def test_folders(tmp_path: Path) -> None:
    """Hidden files, pictures, empty files and metrics are no text; an order that the file system chose won't repeat."""
    folder = tmp_path / "own"
    for name in ("b.txt", "a/z.md", "a.py", ".hidden.txt", ".git/c.txt", "picture.png", "rows.jsonl", "upper.TXT"):
        write(folder / name, json.dumps({"text": name}) if name.endswith("jsonl") else name)
    write(folder / "empty.txt", "")
    write(folder / "run" / "metrics.jsonl", '{"step": 1, "loss": 5.9}\n')
    write(folder / "poems" / "metrics.jsonl", '{"text": "on metre"}\n')
    read = [text_of(document) for document in open_evaluation(str(folder))]
    assert read == ["a/z.md", "a.py", "b.txt", "on metre", "rows.jsonl", "upper.TXT"]


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a folder that is left out in silence makes another corpus; the cache has nothing to do with it."""
    for name in ("a.txt", "open/b.txt", "locked/c.txt"):
        write(tmp_path / "own" / name, name)
    for name in ("rows.jsonl", "notes.txt"):
        write(tmp_path / name, '{"text": "a row", "messages": []}')
    look = os.scandir

    def refused(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: refused(path) if Path(path).name == "locked" else look(path))
    with pytest.raises(ValueError, match=r"own/locked: cannot be read \(Permission denied\)$"):
        open_sources([str(tmp_path / "own")])
    monkeypatch.setattr(Path, "open", lambda path, *_: refused(path))
    rows = str(tmp_path / "rows.jsonl")
    for everything in (
        lambda: [text_of(document) for document in open_evaluation(rows)],
        lambda: [text_of(document) for document in open_evaluation(str(tmp_path / "notes.txt"))],
        lambda: prepare([rows], "char"),
        lambda: list(open_chats([rows]).sides()),
    ):
        with pytest.raises(ValueError, match=r"/(rows\.jsonl|notes\.txt): cannot be read \(Permission denied\)$"):
            everything()


def test_several_values(tmp_path: Path) -> None:
    """A file that is named twice, or once more by its folder, would count double."""
    first, second = (write(tmp_path / f"own/{name}", f"{name}\n" * 100) for name in ("one.txt", "two.txt"))
    train, valid = both_sides(second, tmp_path / "own", second, first)
    assert "".join(train + valid) == second.read_text() + first.read_text()
    opened = open_sources(["stdlib", str(first)])
    assert opened.name == f"stdlib, {first}"
    assert opened.size() == StandardLibrary().size() + first.stat().st_size


def test_jsonl(tmp_path: Path) -> None:
    """Rows are documents; blank lines and empty texts are not. A byte-order mark must not spoil the first row."""
    rows = b'\xef\xbb\xbf{"text": "one\\ntwo"}\n\n{"content": "\xe4\xb8\xad", "id": 3}\n{"text": ""}\n{"text": "three"}'
    read = [text_of(document) for document in open_evaluation(str(write(tmp_path / "rows.jsonl", rows)))]
    assert read == ["one\ntwo", "中", "three"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut', "not valid JSON"),
        ('["text"]', 'needs a string under "text" or "content", found no fields'),
        ('{"title": "a", "body": "b"}', "found title, body"),
        ('{"text": 7}', "needs a string"),
        ('{"text": "\\ud83d"}', "half a surrogate pair"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_jsonl(tmp_path: Path, line: str, reason: str) -> None:
    """One broken line among millions is found only if the message says which."""
    path = write(tmp_path / "rows.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{reason}") as error:
        both_sides(path)
    assert "\n" not in str(error.value)


def test_parquet(tmp_path: Path) -> None:
    """Rows of .parquet are documents, nulls are none, and other columns are not read."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" if i % 10 else None for i in range(1000)]
    parquet.write_table(pyarrow.table({"id": range(1000), "text": texts}), tmp_path / "rows.parquet")
    train, valid = both_sides(tmp_path / "rows.parquet")
    assert sorted(train + valid) == sorted(filter(None, texts))
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r'other\.parquet: needs a column "text" or "content", found id, body'):
        both_sides(tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"numbers\.parquet, row 1, column text: holds int, not text"):
        both_sides(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"text\.parquet: cannot be read as \.parquet"):
        both_sides(write(tmp_path / "text.parquet", "no parquet at all"))


def test_parquet_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing optional package must be named, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"rows\.parquet: .*pip install 'thinker\[parquet\]'"):
        both_sides(write(tmp_path / "rows.parquet", "PAR1"))


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mistake in --data is one line that names what was given."""
    (tmp_path / "nothing").mkdir()
    for value, reason in {
        str(tmp_path / "missing.txt"): "no such file or folder",
        "~nobody/missing.txt": "no such file or folder",
        str(tmp_path / "nothing"): "no text in this folder",
        str(write(tmp_path / "empty.txt", "")): "the file is empty",
        "wikitext2": "for thinker eval only; to train, choose among stdlib",
        "tinyshakespear": "no named set .these are stdlib, tinyshakespeare",
    }.items():
        with pytest.raises(ValueError, match=f"{value}: .*{reason}") as error:
            open_sources([value])
        assert "\n" not in str(error.value)
    monkeypatch.chdir(write(tmp_path / "here" / "rows.jsonl", '{"text": "not asked for"}').parent)
    for values in ([], [""], ["stdlib", ""]):
        with pytest.raises(ValueError, match="no data"):
            open_sources(values)
    for opened in (open_evaluation, lambda value: open_chats([value])):
        with pytest.raises(ValueError, match="no data"):
            opened("")


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_a_pipe_is_no_empty_file(tmp_path: Path) -> None:
    """`--data <(zcat text.gz)` said that the file is empty, which nobody can mend."""
    os.mkfifo(tmp_path / "pipe")
    for opened in (open_evaluation, lambda value: open_sources([value])):
        with pytest.raises(ValueError, match=r"pipe: no regular file, and text is read more than once: save it"):
            opened(str(tmp_path / "pipe"))


def test_fingerprint_notices_changes(tmp_path: Path) -> None:
    """A corpus that changed under an unchanged fingerprint would be trained on as it was."""
    path = write(tmp_path / "own" / "a.txt", "some text")
    seen = [open_sources([str(tmp_path / "own")]).fingerprint() for _ in range(2)]
    write(path, "more text than before")
    seen.append(open_sources([str(tmp_path / "own")]).fingerprint())
    os.utime(path, ns=(0, 0))
    seen.append(open_sources([str(tmp_path / "own")]).fingerprint())
    write(tmp_path / "own" / "b.txt", "another")
    seen.append(open_sources([str(tmp_path / "own")]).fingerprint())
    assert seen[0] == seen[1]
    assert len({json.dumps(value) for value in seen}) == 4


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes must go where the user said, and else into the user's cache, never beside the code."""
    monkeypatch.setenv("THINKER_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("THINKER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_folder() == Path("/there/thinker")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "thinker"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "thinker"


# The Hugging Face hub


class FakeRows(list):
    """What `datasets.load_dataset` gives, as far as it is used."""

    info = types.SimpleNamespace(dataset_size=1234)
    column_names = ("id", "text")

    def select_columns(self, columns: list[str]) -> FakeRows:
        return FakeRows({column: row[column] for column in columns} for row in self)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of the hub is read like any other rows: split by hash, nulls left out, its configuration passed on."""
    asked = []

    def load_dataset(name: str, configuration: str | None, split: str) -> FakeRows:
        asked.append((name, configuration, split))
        return FakeRows({"id": i, "text": f"row {i}" if i else None} for i in range(500))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    train, valid = both_sides("owner/some-set:plain")
    assert sorted(train + valid) == sorted(f"row {i}" for i in range(1, 500))
    assert set(valid) == {f"row {i}" for i in range(1, 500) if held_out(f"row {i}")}
    assert asked == [("owner/some-set", "plain", "train")]  # fetched once for all passes
    assert [text_of(document) for document in open_evaluation("owner/some-set")] == valid


def test_hub_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data/book` may be a mistyped path or a set: the message must help with both."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data/book: no such file or folder; .*pip install 'thinker\[hub\]'"):
        open_sources(["data/book"]).size()
    with pytest.raises(ValueError, match=r"data/book\.txt: no such file or folder"):
        open_sources(["data/book.txt"])

    def fails(*_: object, **__: object) -> None:
        raise FileNotFoundError("Dataset 'data/book' doesn't exist\non the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fails))
    with pytest.raises(
        ValueError, match=r"data/book: cannot be had from the hub \(Dataset 'data/book' doesn't exist\)"
    ):
        open_sources(["data/book"]).size()
    rows = FakeRows([{"text": "a"}, {"text": ["b"]}])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    with pytest.raises(ValueError, match="data/book, row 2, column text: holds list, not text: make it a string"):
        list(open_evaluation("data/book"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "book", "a file without a suffix\n")
    assert both_sides("data/book") == (["a file without a suffi"], ["x\n"])


# Named sets


TEXT = "".join(f"verse {i} of a play that is downloaded\n" for i in range(5000))


def halves(text: str) -> Iterator[tuple[Split, str]]:
    yield "train", text[: len(text) // 2]
    yield "valid", text[len(text) // 2 :]


class Server(http.server.ThreadingHTTPServer):
    """Serves TEXT on 127.0.0.1 and remembers what ranges were asked for."""

    def __init__(self, honours_ranges: bool) -> None:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.headers["Range"])
                if self.path != "/play.txt":
                    self.send_error(404)
                    return
                content = TEXT.encode()
                if honours_ranges:
                    content = content[: int(self.headers["Range"].removeprefix("bytes=0-")) + 1]
                self.send_response(206 if honours_ranges else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    self.wfile.write(content)
                except ConnectionError:  # who has enough hangs up
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(request.param) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def play(server: Server | None, length: int = 100_000) -> NamedSet:
    """A set made of the first bytes of what the server has, or of nothing that could be reached."""
    return NamedSet(
        name="play",
        file="play/input.txt",
        url="http://127.0.0.1:9/play.txt" if server is None else f"http://127.0.0.1:{server.server_port}/play.txt",
        length=length,
        sha256=hashlib.sha256(TEXT.encode()[:length]).hexdigest(),
        cut=halves,
    )


def test_download(server: Server, tmp_path: Path) -> None:
    """A set is fetched once, no more of it than is needed, and found in the cache from then on."""
    found = play(server)
    assert (
        "".join(text_of(document) for split in ("train", "valid") for document in found.documents(split))
        == TEXT[:100_000]
    )
    assert found.locate() == tmp_path / "cache" / "sets" / "play" / "input.txt"
    assert server.asked == ["bytes=0-99999"]


def test_a_wrong_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    """A truncated or altered file under the final name would be trained on, or block every later try."""
    for wrong, reason in (
        (replace(play(server), sha256="0" * 64), "checksum"),
        (replace(play(server), length=len(TEXT) + 1), "checksum"),
        (replace(play(server), url=play(server).url + ".gone"), "404"),
    ):
        message = rf"play: not at .*cache/sets/play/input\.txt, and the download failed .*{reason}"
        with pytest.raises(ValueError, match=message):
            list(wrong.documents("train"))
        assert list((tmp_path / "cache" / "sets" / "play").iterdir()) == []


def test_a_kill_during_a_download_leaves_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file under the final name is what a kill leaves if the file is written in place."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        play(server).locate()
    assert list((cache_folder() / "sets" / "play").iterdir()) == []


def test_given_data_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """THINKER_DATA is for machines without a network: it must be enough, and a wrong file there must be named."""
    monkeypatch.setenv("THINKER_DATA", str(tmp_path / "given"))
    place = write(tmp_path / "given" / "play" / "input.txt", TEXT[:100_000])
    assert play(None).locate() == place
    write(place, TEXT[:99_999])
    with pytest.raises(ValueError, match=r"given/play/input\.txt: not the play that is known by its checksum"):
        play(None).locate()


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the user needs to know every place that was looked at, and where to get the file."""
    monkeypatch.setenv("THINKER_DATA", str(tmp_path / "given"))
    with pytest.raises(ValueError, match=r"play: not at .*given/play/input\.txt nor at .*cache/sets/play") as error:
        play(None).locate()
    assert "put the file from http://127.0.0.1:9/play.txt at one of these places" in str(error.value)
    assert "\n" not in str(error.value)


def test_cuts_of_the_named_sets() -> None:
    """nanoGPT's split decides whether losses can be compared with its own; a story must not lose its end."""
    cut = {name: named.cut for name, named in (TRAINING_SETS | EVALUATION_SETS).items() if isinstance(named, NamedSet)}
    text = "".join(map(str, range(1000)))
    border = int(len(text) * 0.9)
    assert list(cut["tinyshakespeare"](text)) == [("train", text[:border]), ("valid", text[border:])]
    assert list(cut["wikitext2"](text)) == [("valid", text)]
    stories = [f"Once upon a time {i}.\nThe end." for i in range(500)]
    parts = list(cut["tinystories"]("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n"))
    assert [story for _, story in parts] == stories
    assert all(held_out(story) == (side == "valid") for side, story in parts)


@pytest.mark.skipif(REAL_DATA is None, reason="THINKER_DATA is not set")
def test_the_real_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong checksum or length makes a set unusable for everybody."""
    monkeypatch.setenv("THINKER_DATA", REAL_DATA)
    sizes = {}
    for name in ("tinyshakespeare", "tinystories"):
        sizes[name] = [sum(document.size for document in TRAINING_SETS[name].documents(s)) for s in ("train", "valid")]
    assert sizes["tinyshakespeare"] == [1_003_854, 111_540]  # as nanoGPT reports it
    assert sum(sizes["tinystories"]) > 2_000_000
    assert sum(document.size for document in open_evaluation("wikitext2")) == 1_121_681
