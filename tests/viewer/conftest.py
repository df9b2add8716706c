"""A scan whose frame is easily got wrong, and a server for it."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from braindino.encoders.slice_transformer import SliceTransformer
from braindino.viewer.scans import ScanShelf, given_source
from braindino.viewer.server import TOKEN_HEADER, ViewServer
from braindino.viewer.session import Session
from braindino.viewer.token_planes import LoadedEncoder
from braindino.vision_transformer import vit_tiny
from braindino.volume import save_array

# Stored LAS: the first axis runs to the left. Anisotropic, and far from the origin.
SHAPE = (44, 60, 26)
SPACING = (2.0, 1.5, 3.0)
AFFINE = np.array([[-2.0, 0, 0, 131.0], [0, 1.5, 0, -22.0], [0, 0, 3.0, 47.0], [0, 0, 0, 1]])
# The mark: 7 x 7 x 5 voxels around this one, in the indices of the file; more than the 0.5 % that are clipped.
MARK_IN_FILE = (17, 37, 14)
MARK_INTENSITY = 900


class Phantom(NamedTuple):
    """Files of one scan.

    Attributes:
        scan: int16, LAS; an ellipsoid of noise from 100 to 400, brighter to the front, with a mark of 900.
        mask: the ellipsoid, of the scan on the same grid.
        segmentation: label 2 at the mark, label 7 in a block at the back; RAS, on a grid of its own.
        voxel: the mark's middle in RAS+.
    """

    scan: Path
    mask: Path
    segmentation: Path
    voxel: tuple[int, int, int]


def write_phantom(folder: Path, *, seed: int = 0, skull: bool = False) -> Phantom:
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.arange(extent) for extent in SHAPE), indexing="ij")
    inside = ((x - 23) / 17) ** 2 + ((y - 28) / 24) ** 2 + ((z - 12) / 11) ** 2 < 1
    data = rng.integers(100, 300, SHAPE) + 100 * y // SHAPE[1]
    i, j, k = MARK_IN_FILE
    mark = np.zeros(SHAPE, dtype=bool)
    mark[i - 3 : i + 4, j - 3 : j + 4, k - 2 : k + 3] = True
    assert inside[mark].all()
    data[mark] = MARK_INTENSITY
    if not skull:
        data[~inside] = 0
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("scan.nii.gz", "mask.nii.gz", "labels.nii.gz")]
    save_array(data, AFFINE, paths[0], dtype=np.int16)
    save_array(inside, AFFINE, paths[1], dtype=np.uint8)
    # Another grid: RAS, 1 mm, a box around the middle of the head.
    centre = AFFINE @ np.array([i, j, k, 1.0])
    labels = np.zeros((60, 60, 60), dtype=np.uint8)
    grid = np.eye(4)
    grid[:3, 3] = centre[:3] - 30
    labels[27:34, 28:33, 26:35] = 2
    labels[20:40, 2:12, 26:35] = 7
    save_array(labels, grid, paths[2], dtype=np.uint8)
    return Phantom(*paths, voxel=(SHAPE[0] - 1 - i, j, k))


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Phantom:
    return write_phantom(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="session")
def tiny_encoder() -> LoadedEncoder:
    """Four blocks that each change the tokens: with DINOv3's own start they hardly do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = vit_tiny(depth=4, layer_scale_init=10)
    network.name, network.sha256 = "tiny", "0" * 64
    return LoadedEncoder("encoder-0", "tiny", SliceTransformer(network))


@dataclass
class Client:
    """Asks a server, with its token unless told otherwise."""

    server: ViewServer

    def ask(
        self,
        address: str,
        question: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str | None] | None = None,
        body: bytes | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. A header of None is left out."""
        content = body if body is not None else None if question is None else json.dumps(question).encode()
        sent: dict[str, str | None] = {
            "Host": f"127.0.0.1:{self.server.server_port}",
            TOKEN_HEADER: self.server.token,
            "Content-Type": "application/json" if content is not None else None,
            "Content-Length": str(len(content)) if content is not None else None,
            **(headers or {}),
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        connection.putrequest(method or ("GET" if content is None else "POST"), address, skip_host=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(content)
        response = connection.getresponse()
        result = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return result

    def json(self, address: str, question: Any = None) -> dict[str, Any]:
        status, _, body = self.ask(address, question)
        assert status == 200, body
        content: dict[str, Any] = json.loads(body)
        return content

    def error(self, address: str, question: Any = None, **options: Any) -> tuple[int, dict[str, str]]:
        status, headers, body = self.ask(address, question, **options)
        assert headers["Content-Type"] == "application/json"
        return status, json.loads(body)["error"]


@pytest.fixture
def serve() -> Iterator[Callable[[Session], Client]]:
    """Starts servers; all are stopped at the end."""
    running: list[tuple[ViewServer, threading.Thread]] = []

    def start(session: Session) -> Client:
        server = ViewServer(session)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((server, thread))
        return Client(server)

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def phantom_session(phantom: Phantom, tiny_encoder: LoadedEncoder) -> Session:
    source = given_source(phantom.scan, mask=None, segmentation=phantom.segmentation)
    return Session(ScanShelf([source]), [tiny_encoder], {})
