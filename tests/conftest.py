"""What several folders of tests share: the toy bundle, and a real server around it on free ports."""

import asyncio
import io
import json
import select
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from weakseg.model import Model

# A deadline is a timed assertion; on a busy machine it fails for no fault of the code.
settings.register_profile("weakseg", deadline=None)
settings.load_profile("weakseg")

TOY_MODELS = Path(__file__).parent / "data" / "bundles"
ROOT = Path(__file__).parents[1]
LONG_S = 60.0


@pytest.fixture(scope="session")
def toy_bundle():
    """tests/data/make_toy_bundle.py says what it computes: it tells red, green and blue apart."""
    return TOY_MODELS / "toy" / "1"


@pytest.fixture(scope="session")
def model(toy_bundle):
    """The toy bundle, open."""
    import weakseg

    with weakseg.load(toy_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def freed_in(monkeypatch):
    """Names of the threads that gave the memory of images back, once they have: of what the network sees of each."""
    names, decode = [], Model.decode

    def decode_and_watch(self, *args, **options):
        decoded = decode(self, *args, **options)
        weakref.finalize(decoded.prepared, lambda: names.append(threading.current_thread().name))
        return decoded

    monkeypatch.setattr(Model, "decode", decode_and_watch)
    return names


@pytest.fixture(scope="session")
def colours():
    """An image with all three classes and grey background, 40 x 56, whose bottom right corner is undecided."""
    image = np.full((40, 56, 3), 128, np.uint8)
    image[:20, :28] = [255, 0, 0]
    image[20:, :28] = [10, 230, 20]
    image[:20, 40:] = [30, 30, 220]
    image[28:, 40:] = [170, 60, 60]
    return image


@pytest.fixture(scope="session")
def png():
    """A function: (H, W, 3) uint8 to the bytes of a PNG."""

    def encode(image, **options):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, **({"format": "PNG"} | options))
        return buffer.getvalue()

    return encode


class GatedRunner:
    """A real runner that a test can hold: with `gate` closed, executions wait. `batches` are (graph, size) in order."""

    def __init__(self, inner):
        self.inner = inner
        self.gate = threading.Event()
        self.gate.set()
        self.batches = []
        self.error = None

    @property
    def provider(self):
        return self.inner.provider

    def run(self, graph, images, outputs=None):
        self.batches.append((graph, len(images)))
        assert self.gate.wait(LONG_S), "the test never opened the gate"
        if self.error is not None:
            raise self.error
        return self.inner.run(graph, images, outputs)

    def close(self):
        self.inner.close()


class Serving:
    """A server in a thread of its own. `runner` is the gated runner of the model that was loaded last.

    folders: bundles, or a function that looks for them; None = the toy ones.
    """

    def __init__(self, folders=None, load=None, wait_loaded=True, **config):
        from serve.server import Server
        from serve.settings import ServeConfig

        settings = {"host": "127.0.0.1", "port": 0, "metrics_port": 0, "threads": 1, "max_delay_ms": 0.0} | config
        self.runner = None
        self._folders, self._load = folders, load or self._load_gated
        self._started, self._stop = Future(), None
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(Server, ServeConfig(**settings)),))
        self._thread.start()
        self.server = self._started.result(LONG_S)
        if wait_loaded:
            self.call(self.server.wait_loaded())

    @property
    def target(self):
        return f"127.0.0.1:{self.server.port}"

    @property
    def metrics_url(self):
        return f"http://127.0.0.1:{self.server.metrics_port}"

    def sample(self, name, **labels):
        """Value of a metric, 0 where it was never touched."""
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0

    def call(self, coroutine):
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LONG_S)

    def until(self, condition):
        """Wait for a condition, looked at on the server's loop."""

        async def wait():
            while not condition():
                await asyncio.sleep(0.001)

        self.call(asyncio.wait_for(wait(), LONG_S))

    def close(self):
        if self.runner is not None:
            self.runner.gate.set()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()

    async def _main(self, make, config):
        from serve.repository import find_bundles

        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            folders = find_bundles([], TOY_MODELS) if self._folders is None else self._folders
            scan = folders if callable(folders) else lambda: folders
            server = make(config, scan, self._load)
            await server.start()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(server)
        await self._stop.wait()
        await server.stop(delay_s=0.0, grace_s=LONG_S)

    def _load_gated(self, path):
        import weakseg

        model = weakseg.load(path, threads=1)
        self.runner = model.runner = GatedRunner(model.runner)
        return model


@pytest.fixture
def serving():
    """A function that starts a server: `serving(max_batch=4)`; keywords of ServeConfig, `folders`, `load`."""
    started = []

    def start(**options):
        started.append(Serving(**options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def shared_serving():
    """One server with defaults for a whole module."""
    server = Serving()
    yield server
    server.close()


@pytest.fixture
def process(toy_bundle):
    """A function that starts `weakseg serve` in a process of its own; returns it and what it printed about itself."""
    started = []

    def start(*flags):
        args = [sys.executable, "-c", "import sys; from weakseg.cli import main; sys.exit(main())", "serve", "--json"]
        args += ["--bundle", str(toy_bundle), "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
        child = subprocess.Popen(
            [*args, "--threads", "1", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(child)
        assert select.select([child.stdout], [], [], LONG_S)[0], "the server said nothing"
        return child, json.loads(child.stdout.readline())

    yield start
    for child in started:
        child.kill()
        child.communicate()
