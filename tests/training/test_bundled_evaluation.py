"""The examination of an endpoint: exact answers, a table by family, and an exit status that a script can use."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from examples.bundled import evaluate
from examples.bundled.conversations import examination
from examples.bundled.generate import write_records
from examples.bundled.scoring import Tally, read_questions, score

Answer = Callable[[dict[str, Any]], str | None]  # None: refused
KEY = "the-key"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "heldout.jsonl"
    write_records(path, examination(0, 4))
    return path


@contextmanager
def endpoint(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server of one model on loopback, and the bodies it was sent."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "small"}, {"id": "other"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            said = answer(body) if self.headers.get("Authorization") == f"Bearer {KEY}" else None
            if said is None:
                self.reply(401, {"error": {"message": "no such key"}})
            else:
                self.reply(200, {"choices": [{"message": {"role": "assistant", "content": said}}]})

        def reply(self, status: int, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # connections that come at once

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    return evaluate.main()


def knows(questions: Path) -> Answer:
    """Who has read the right answers."""
    right = {json.dumps(one.messages): one.answer for one in read_questions(questions)}
    return lambda body: right[json.dumps(body["messages"])]


def test_one_who_knows_everything_passes(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(knows(questions)) as (url, bodies):
        assert run(monkeypatch, "--url", url, "--questions", questions, "--api-key", KEY, "--at-least", 1) == 0
    assert len(bodies) == len(read_questions(questions)) == 64
    assert {(body["model"], body["temperature"]) for body in bodies} == {("small", 0)}
    table = capsys.readouterr().out
    assert "subtract" in table
    assert "100.0%" in table


def test_one_family_below_the_share_fails(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though all together are far above it."""
    knowing = knows(questions)
    spoiled = next(one for one in read_questions(questions) if one.family == "greet")

    def spoils_one(body: dict[str, Any]) -> str | None:
        return "Moo" if tuple(body["messages"]) == spoiled.messages else knowing(body)

    with endpoint(spoils_one) as (url, _):
        arguments = ("--url", url, "--questions", questions, "--api-key", KEY, "--model", "small")
        assert run(monkeypatch, *arguments, "--at-least", 0.95) == 1
        assert run(monkeypatch, *arguments, "--at-least", 0.75) == 0
    out = capsys.readouterr().out
    assert "75.0%" in out
    assert f"{spoiled.question!r} answered 'Moo', not {spoiled.answer!r}" in " ".join(out.split())


def test_what_cannot_be_asked_is_said(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(knows(questions)) as (url, _):
        assert run(monkeypatch, "--url", url, "--questions", questions, "--api-key", "wrong") == 2
    assert "no such key" in capsys.readouterr().err
    assert run(monkeypatch, "--url", url, "--questions", questions) == 2  # nobody is there any more
    assert "is it running" in capsys.readouterr().err
    assert run(monkeypatch, "--questions", tmp_path / "absent.jsonl") == 2
    assert "absent.jsonl" in capsys.readouterr().err
    assert run(monkeypatch, "--questions", questions, "--at-least", 95) == 2
    assert "--at-least 95.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no record of messages"),
        ('{"text": "Hello"}', "no record of messages"),
        ('{"messages": [{"role": "user"}]}', "no record of messages"),
        ('{"messages": [{"role": "assistant", "content": "Hello"}]}', "as the last messages"),
        ('{"messages": [{"role": "user", "content": "Hello"}]}', "as the last messages"),
        ("", "holds no questions"),
    ],
)
def test_a_file_of_something_else_is_refused(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=says):
        read_questions(path)


def test_only_the_exact_answer_counts(tmp_path: Path) -> None:
    records = [
        (f"{family}.{number}", answer) for number, (family, answer) in enumerate((("a", "1"), ("a", "2"), ("b", "3")))
    ]
    lines = [
        json.dumps(
            {"id": id_, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
        )
        for id_, answer in records
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines))
    result = score(read_questions(path), [" 1\n", "2.", "3"])
    assert result.families == {"a": Tally(1, 2), "b": Tally(1, 1)}
    assert result.overall == Tally(2, 3)
    assert result.least == 0.5
    assert [(wrong.asked.answer, wrong.answer) for wrong in result.wrong] == [("2", "2.")]
    with pytest.raises(ValueError, match="zip"):
        score(read_questions(path), ["1"])
