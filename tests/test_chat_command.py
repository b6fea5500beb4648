"""`thinker chat`: what a conversation remembers and drops, commands, messages of several lines, terminal and pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_llm import folder_of

from thinker import load
from thinker.commands import chat as command
from thinker.commands.conversation import Conversation
from thinker.commands.lines import Entry, read_entry, typed_lines
from thinker.messages import text_of


class FakeLLM:
    """A token is a word; replies are r1, r2, …, each with as many words more as `long` says."""

    def __init__(self, ctx_len: int = 40, long: int = 0, system: bool = True) -> None:
        self.config = SimpleNamespace(ctx_len=ctx_len)
        self.long, self.system = long, system
        self.asked: list[list[dict[str, str]]] = []

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.system and messages[0]["role"] == "system":
            raise ValueError("the chat template refuses this conversation: no system")
        return [0] * (1 + sum(1 + len(text_of(message["content"]).split()) for message in messages))

    def prompt_length(self, messages: list[dict[str, str]]) -> int:
        return len(self.encode(messages))

    def stream_chat(self, messages: list[dict[str, str]], **options: Any) -> Iterator[str]:
        if len(self.encode(messages)) >= self.config.ctx_len:
            raise ValueError(f"the prompt has {len(self.encode(messages))} tokens")
        return self.reply(messages)

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        self.asked.append(messages)
        yield f"r{len(self.asked)}"
        yield from [" more"] * self.long


def talk(llm: FakeLLM, *texts: str, system: str = "", room: int = 8) -> list[str]:
    """What a person is told while they say all this."""
    notices: list[str] = []
    conversation = Conversation(llm, {"max_new_tokens": room}, notices.append, system)  # type: ignore[arg-type]
    for text in texts:
        list(conversation.ask(text))
    return notices


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


# What the model remembers


def test_the_whole_conversation_is_given_each_time():
    """Bug: the model sees only the last message, or replies under the wrong role."""
    llm = FakeLLM()
    assert talk(llm, "a", "b", system="hm") == []
    assert [(m["role"], m["content"]) for m in llm.asked[1]] == [
        ("system", "hm"), ("user", "a"), ("assistant", "r1"), ("user", "b"),
    ]  # fmt: skip


def test_a_full_context_drops_the_oldest_exchanges_and_says_so():
    """Bug: a long conversation ends in an error; the system message goes first; half an exchange stays; silence."""
    llm = FakeLLM(ctx_len=40, long=3)
    notices = talk(llm, *(f"question {n} is rather long" for n in range(6)), system="be brief")
    for messages in llm.asked:
        assert messages[0] == {"role": "system", "content": "be brief"}
        assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * ((len(messages) - 2) // 2) + ["user"]
        assert len(llm.encode(messages)) + 8 <= 40
    assert notices
    assert all(
        line.startswith("the context of 40 tokens is full: dropped the oldest") and "system message" in line
        for line in notices
    )
    assert "'question 0 is rather long' on" in notices[0]
    assert contents(llm.asked[1])[1:2] == ["question 0 is rather long"]
    assert "question 0 is rather long" not in contents(llm.asked[-1])
    assert contents(llm.asked[-1])[-1] == "question 5 is rather long"
    assert len(notices) < 4, "some room is made at a time, not at every message"


def test_a_message_that_is_too_long_alone_drops_nothing():
    """Bug: a slip of the clipboard costs the conversation."""
    llm, notices = FakeLLM(), []
    conversation = Conversation(llm, {"max_new_tokens": 8}, notices.append)  # type: ignore[arg-type]
    list(conversation.ask("a"))
    with pytest.raises(ValueError, match="tokens"):
        list(conversation.ask("word " * 99))
    list(conversation.ask("b"))
    assert (contents(llm.asked[-1]), notices) == (["a", "r1", "b"], [])


def test_a_reply_that_is_stopped_counts_as_far_as_it_came():
    """Bug: after Ctrl-C two messages of the user follow one another, which templates refuse."""
    llm = FakeLLM(long=5)
    conversation = Conversation(llm, {"max_new_tokens": 8}, print)  # type: ignore[arg-type]
    reply = conversation.ask("a")
    assert [next(reply), next(reply)] == ["r1", " more"]
    reply.close()
    list(conversation.ask("b"))
    assert contents(llm.asked[-1]) == ["a", "r1 more", "b"]


def test_system_reset_and_save(tmp_path):
    """Bug: /reset loses the system message, /system the conversation, /save what was dropped or what was saved."""
    llm, path = FakeLLM(ctx_len=24), tmp_path / "talk.jsonl"
    conversation = Conversation(llm, {"max_new_tokens": 8}, lambda line: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing has been said"):
        conversation.save(path)
    for n in range(5):
        list(conversation.ask(f"number {n} é"))
    assert len(llm.asked[-1]) < 9
    conversation.tell("hm")
    assert conversation.save(path) == 5
    conversation.reset()
    list(conversation.ask("again"))
    assert contents(llm.asked[-1]) == ["hm", "again"]
    assert conversation.save(path) == 1
    conversation.tell("")
    list(conversation.ask("more"))
    assert contents(llm.asked[-1]) == ["again", "r6", "more"]
    first, second = (json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines())
    assert contents(first) == ["hm", *(text for n in range(5) for text in (f"number {n} é", f"r{n + 1}"))]
    assert contents(second) == ["hm", "again", "r6"]
    from thinker.data.chats import ChatFiles

    assert [list(one.messages) for one in ChatFiles([str(path)]).everything()] == [first, second]
    for path in (tmp_path, Path("~nobody/talk.jsonl")):
        with pytest.raises(ValueError, match="can't be written"):
            conversation.save(path)


def test_what_was_attached_waits_for_a_message_that_fits(tmp_path):
    """Bug: the picture of a message that was too long is gone, and the shorter one is asked without it."""
    llm = FakeLLM()
    conversation = Conversation(llm, {"max_new_tokens": 8}, lambda line: None)  # type: ignore[arg-type]
    conversation.attach(tmp_path / "7.png")
    with pytest.raises(ValueError, match="tokens"):
        list(conversation.ask("word " * 99))
    list(conversation.ask("what?"))
    list(conversation.ask("more"))
    picture = {"type": "image", "image": str(tmp_path / "7.png")}
    assert llm.asked[0][0]["content"] == [picture, {"type": "text", "text": "what?"}]
    assert contents(llm.asked[1][1:]) == ["r1", "more"]


def test_what_is_attached_is_named_from_the_root_on(tmp_path, monkeypatch):
    """Bug: a saved conversation's picture that is found from one folder only, or a link to itself ends the talk."""
    monkeypatch.chdir(tmp_path)
    Path("7.png").symlink_to("7.png")
    llm = FakeLLM()
    conversation = Conversation(llm, {"max_new_tokens": 8}, print)  # type: ignore[arg-type]
    conversation.attach(Path("7.png"))
    list(conversation.ask("what?"))
    assert llm.asked[0][0]["content"][0] == {"type": "image", "image": str(tmp_path / "7.png")}


def test_a_system_message_that_leaves_no_room_is_refused_at_once():
    """Bug: every message after it is refused, and told to be shorter."""
    conversation = Conversation(FakeLLM(ctx_len=20), {"max_new_tokens": 8}, lambda line: None, "be brief")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the system message takes 22 of the context's 20 tokens"):
        conversation.tell("word " * 19)
    assert list(conversation.ask("a")) == ["r1"]


def test_a_template_without_system_messages_refuses_one_at_once():
    """Bug: every later message fails because of a system message that was taken."""
    conversation = Conversation(FakeLLM(system=False), {"max_new_tokens": 8}, print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no system"):
        conversation.tell("hm")
    assert list(conversation.ask("a")) == ["r1"]


# Typing


def typed(text: str) -> list[Entry]:
    lines = iter(text.split("\n"))

    def ask(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return list(iter(lambda: read_entry(ask), None))


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a\n\nb", [Entry("a"), Entry(""), Entry("b")]),
        ("a\\\nb\\\n\nc", [Entry("a\nb\n"), Entry("c")]),
        ('"""a\n\n  b"""\nc', [Entry("a\n\n  b"), Entry("c")]),
        ('"""\na\n"""', [Entry("\na\n")]),
        ('"""a"""', [Entry("a")]),
        ('"""/reset"""', [Entry("/reset")]),
        ('"""a\nb', [Entry("a\nb")]),
        ("a\\", [Entry("a")]),
        ("/system be brief ", [Entry("/system be brief", is_command=True)]),
        (" /reset", [Entry(" /reset")]),
    ],
)
def test_messages_of_several_lines(text, entries):
    """Bug: each line is sent alone, marks are sent along, or an unfinished message is lost at the end of a pipe."""
    assert typed(text) == entries


def test_prompt_toolkit_is_used_where_it_is_installed(tmp_path, monkeypatch):
    """Bug: an optional library that is never used, or without its history."""
    asked = []

    class Session:
        def __class_getitem__(cls, item: type) -> type:
            return cls

        def __init__(self, history: object) -> None:
            self.history = history

        def prompt(self, text: str) -> str:
            asked.append((text, self.history))
            return "typed"

    toolkit, history = types.ModuleType("prompt_toolkit"), types.ModuleType("prompt_toolkit.history")
    monkeypatch.setattr(toolkit, "PromptSession", Session, raising=False)
    monkeypatch.setattr(history, "FileHistory", lambda path: Path(path).name, raising=False)
    monkeypatch.setattr(history, "InMemoryHistory", dict, raising=False)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", toolkit)
    monkeypatch.setitem(sys.modules, "prompt_toolkit.history", history)
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    with typed_lines(True) as ask:
        assert ask("> ") == "typed"
    assert asked == [("> ", "chat-history-prompt-toolkit")]


def test_the_prompt_is_not_among_replies_that_go_to_a_file(monkeypatch, capsys):
    """Bug: `thinker chat m > replies.txt` fills the file with "> "."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    with typed_lines(True) as ask:
        assert ask("> ") == "a"
    assert capsys.readouterr() == ("", "> ")


# The command

SCRIPT = """\
a
/save {file}
b \\
and c
/system be brief
d
/reset
e
/help
/quit
never
"""


def test_a_pipe_holds_a_conversation_with_commands(tmp_path, monkeypatch, capfd):
    """Bug: commands work on a terminal only, or say things on stdout that a script takes for a reply."""
    llm = FakeLLM()
    monkeypatch.setattr(command, "load", lambda *_, **__: llm)
    monkeypatch.setattr("sys.stdin", io.StringIO(SCRIPT.format(file=tmp_path / "talk.jsonl")))
    assert command.run(command.Options(model="m")) == 0
    out, err = capfd.readouterr()
    assert out == "r1\nr2\nr3\nr4\n"
    assert err == command.HELP + "\n"
    assert contents(llm.asked[2]) == ["be brief", "a", "r1", "b \nand c", "r2", "d"]
    assert contents(llm.asked[3]) == ["be brief", "e"]
    assert (tmp_path / "talk.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("line", ["/save", "/save .", "/rset", "word " * 99])
def test_in_a_pipe_a_mistake_ends_the_command(monkeypatch, line):
    """Bug: a script that can't save goes on and reports success."""
    monkeypatch.setattr(command, "load", lambda *_, **__: FakeLLM())
    monkeypatch.setattr("sys.stdin", io.StringIO(f"a\n{line}\n"))
    with pytest.raises(ValueError):
        command.run(command.Options(model="m"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("model"))


def test_the_cache_keeps_the_conversation(folder):
    """Bug: every message computes the whole conversation anew."""
    llm = load(folder, backend="torch", slots=1)
    conversation = Conversation(llm, {"max_new_tokens": 3, "temperature": 0.0}, print)
    list(conversation.ask("a"))
    reused = []
    run = llm.engine.run

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for piece in run(*arguments, **options):
            if piece.result is not None:
                reused.append((piece.result.reused_tokens, piece.result.prompt_tokens))
            yield piece

    llm.engine.run = watched  # type: ignore[method-assign]
    list(conversation.ask("b"))
    ((kept, prompt),) = reused
    assert 3 <= kept < prompt


def chat(monkeypatch, capfd, stdin: bytes, folder: Path, **fields) -> tuple[int, str, str]:
    from thinker.commands.chat import Options, run

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    status = run(Options(**{"model": str(folder), "backend": "torch", "temperature": 0, "max_new_tokens": 4} | fields))
    return status, *capfd.readouterr()


def test_chat_replies_to_each_line_with_the_conversation_so_far(folder, monkeypatch, capfd):
    """Catches a conversation that forgets, that goes on after /reset, or doesn't end."""
    llm = load(folder, backend="torch")
    system = [{"role": "system", "content": "hm"}]
    first = [*system, {"role": "user", "content": "a"}]
    one = llm.chat(first, max_new_tokens=4)
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "b"}]
    two = llm.chat(second, max_new_tokens=4)
    status, out, err = chat(monkeypatch, capfd, b"a\nb\n\n/reset\na\n/quit now\nnever\n", folder, system="hm")
    assert (status, out) == (0, f"{one}\n{two}\n{one}\n")
    assert err == ""
    assert chat(monkeypatch, capfd, b"a\n", folder, system="hm")[:2] == (0, f"{one}\n")


def test_chat_with_a_model_that_has_no_turns_says_so_at_once(tmp_path, monkeypatch, capfd):
    """Catches a first line that is typed in vain."""
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        chat(monkeypatch, capfd, b"a\n", folder_of(tmp_path, tokenizer=None))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}])
def test_chat_refuses_a_way_of_writing_that_is_none_at_once(folder, monkeypatch, capfd, wrong):
    """Catches a first message that is typed in vain: here there is none."""
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        chat(monkeypatch, capfd, b"", folder, **wrong)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, a minute at most."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_on_a_terminal_chat_survives_what_goes_wrong(folder, tmp_path):
    """Catches a session lost to a message that is too long or no UTF-8, and prompts among a terminal's replies."""
    script = (
        "from thinker.commands import main\n"
        f"main(['chat', {str(folder)!r}, '--backend', 'torch', '--max-new-tokens', '2'])\n"
    )
    master, terminal = pty.openpty()
    session = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "dumb", "THINKER_CACHE": str(tmp_path)},
    )
    os.close(terminal)
    said: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                said.append(os.read(master, 4096))
            except OSError:  # the terminal is gone
                return

    ear = threading.Thread(target=listen)
    ear.start()
    os.write(master, b"x" * 200 + b"\n" + b"\xff\na \\\nand b\n/system hm\n/rset\n")
    wait_for(lambda: b"/rset is no command" in b"".join(said))
    session.send_signal(signal.SIGINT)  # while nothing is written
    wait_for(lambda: b"".join(said).count(b"/reset begins anew") == 2)
    os.write(master, b"/quit\n")
    status = session.wait(60)
    ear.join(10)
    os.close(master)
    shown = b"".join(said).decode(errors="replace")
    assert status == 0
    assert "leaves no room" in shown
    assert "bytes that are no UTF-8" in shown
    assert shown.count("/reset begins anew") == 2
    assert "from here on the model is told so" in shown
    assert "Traceback" not in shown
    assert "and b" in (tmp_path / "chat-history").read_text(errors="replace")
