"""A server on this machine for the files of a folder, with listings, and blocks of files if it is told so."""

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    """Attributes: `url`; `sent`, the bytes of files sent so far; `with_blocks`, whether clients may ask for blocks."""

    def __init__(self, folder: Path, with_blocks: bool):
        super().__init__(("127.0.0.1", 0), functools.partial(Calls, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.with_blocks, self.sent = with_blocks, 0


class Calls(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_content: bool):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET() if with_content else super().do_HEAD()
        content = path.read_bytes()
        block = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.with_blocks else None
        self.send_response(206 if block else 200)
        if block:
            start, stop = int(block[1]), min(int(block[2] or len(content)) + 1, len(content))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        if self.server.with_blocks:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)
            self.server.sent += len(content)


@contextmanager
def serve(folder: Path, with_blocks: bool = True) -> Iterator[FileServer]:
    server = FileServer(folder, with_blocks)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
