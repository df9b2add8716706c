"""``python benchmarks/viewer_click.py SCAN [--encoder ENCODER]``: how long a click of the viewer takes, asked over its
own server as the page does; drawing is not in it.
"""

import http.client
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from braindino.viewer.scans import GIVEN
from braindino.viewer.server import TOKEN_HEADER, ViewServer
from braindino.viewer.view import ViewConfig, build_session


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time of the first map of a scan, of the first click on a slice, and of further clicks."""

    scan: tyro.conf.Positional[Path]
    """A skull-stripped NIfTI file."""
    encoder: str = "untrained:vit_base"
    """As for `braindino view`."""
    wait: float = 2.0
    """Seconds between the opening of the scan and the first click."""
    num_slices: int = 12
    """Slices to click on."""


def main() -> None:
    config = tyro.cli(Config)
    session = build_session(ViewConfig(scan=config.scan, encoder=(config.encoder,)))
    server = ViewServer(session)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    facts = session.scan_facts(GIVEN)
    x, y, z = facts["centre"]
    [encoder] = session.scene()["encoders"]

    def click(voxel: list[int], layer: int) -> tuple[float, int]:
        """Seconds and bytes of one answer."""
        question = {"scan": GIVEN, "encoder": encoder["key"], "block": encoder["blocks"] - 1, "smooth": True}
        body = json.dumps(question | {"voxel": voxel, "layer": layer})
        headers = {TOKEN_HEADER: server.token, "Content-Type": "application/json"}
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("POST", "/api/similarity", body, headers)
        answer = connection.getresponse().read()
        content: dict[str, Any] = json.loads(answer)
        assert "map" in content, content
        return time.perf_counter() - start, len(answer)

    time.sleep(config.wait)
    first, size = click([x, y, z], z)
    layers = [z + 1 + number for number in range(config.num_slices)]
    on_new_slices = [click([x, y, layer], layer)[0] for layer in layers]
    again = [click([x + step, y - step, z], z)[0] for step in range(1, 21)]
    print(f"{facts['shape']} voxels, {encoder['name']}: answers of {size / 1000:.0f} kB")
    print(f"first map of the scan, {config.wait:g} s after it was opened: {first:.2f} s")
    print(f"first click on a slice: median {median(on_new_slices):.2f} s, fastest {min(on_new_slices):.2f} s")
    print(f"further clicks: median {1000 * median(again):.0f} ms, fastest {1000 * min(again):.0f} ms")
    server.shutdown()
    thread.join()
    server.server_close()


if __name__ == "__main__":
    main()
