from collections.abc import Iterator
from threading import Thread

import pytest
from loopback_hub import Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
