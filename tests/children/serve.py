"""
A small server with the OpenAI API, which tests start as a program of its own: it opens the model, and answers as its options say.

``--tell`` is an expression: its value, or the name of the error that it raises, is the text that the server completes with.
"""

from __future__ import annotations

import argparse
import http.server
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    Handler.options = options = read_options()
    exec(options.begin, globals())  # what the test wants done before it listens
    for path in [options.model] if options.model else sorted(Path(options.folder).glob("*.safetensors")):
        data = Path(path).read_bytes()
        if options.dislike and options.dislike.encode() in data:
            sys.exit(f"{options.complaint or 'cannot load it'}: {Path(path).name}")
    time.sleep(options.delay)
    with Path(options.model or options.folder + "/config.json").open("rb"):
        http.server.ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serve")
    for name in ("model", "folder", "name", "context", "tell", "begin", "dislike", "complaint"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--refuse", type=int, default=0, help="the status of every answer to a job")
    parser.add_argument("--lazy", action="store_true", help="list no model, as servers do that load one when it is asked for")
    return parser.parse_args()


class Handler(http.server.BaseHTTPRequestHandler):
    options: argparse.Namespace

    def do_GET(self) -> None:
        self.reply(200, {"data": [] if self.options.lazy else [{"id": self.options.name or "a-model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.options.refuse:
            self.reply(self.options.refuse, {"error": {"message": "this is what I say"}})
            return
        text = told(self.options.tell) if self.options.tell else f"{asked['model']} says: {asked.get('prompt', '')}"
        usage = {"completion_tokens": 4, "prompt_tokens": 2}
        choices = [{"text": text, "message": {"content": text}}]
        self.reply(200, {"choices": choices, "data": [{"embedding": [0.5, 0.5]}], "usage": usage})

    def reply(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def told(expression: str) -> str:
    try:
        return str(eval(expression))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
