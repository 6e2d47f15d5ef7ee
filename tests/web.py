"""A web server of a folder, in a thread: what it was asked for, and answers that a test wants instead."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """asked: paths with their queries, in order. answers: {path: [a status, or "cut", for each of the next times]}."""

    def server_bind(self) -> None:  # HTTPServer's own looks its name up in the DNS, which can take many seconds
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address
        self.asked, self.answers = [], {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        todo = self.server.answers.get(self.path.partition("?")[0], [])
        what = todo.pop(0) if todo else None
        if isinstance(what, int):
            self.send_error(what)
        elif what == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            super().do_GET()

    def log_message(self, *args) -> None:
        pass


@contextmanager
def web_server(folder: Path) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
