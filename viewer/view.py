"""``braindino view``: look at a scan, and at what an encoder holds to be alike in it, on a page of this machine."""

import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from braindino.command_line import command_line
from braindino.devices import choose_device
from braindino.encoders.catalogue import load_volume_encoder
from braindino.encoders.options import parse_options
from braindino.feature_table import FeatureTable
from braindino.manifest import SEQUENCES
from braindino.viewer.neighbours import read_tables
from braindino.viewer.scans import GIVEN, ScanShelf, Source, given_source, prepared_sources
from braindino.viewer.server import ViewServer
from braindino.viewer.session import Session
from braindino.viewer.token_planes import LoadedEncoder


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Look at a scan in three planes with its mask, segmentation and similarity maps; a click shows what else looks
    like this point to the encoder (paper sec. 4.6).

    Give a scan, or a prepared folder to choose from, or both. The page is served on this machine alone, to whoever has
    its address, and nothing is sent anywhere: docs/viewer.md. Ctrl-C ends it.
    """

    scan: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[SCAN]")] = None
    """A NIfTI file, skull-stripped or with --mask."""
    mask: Path | None = None
    """Its brain mask, on the same grid."""
    segmentation: Path | None = None
    """A label map to lay over it, on any grid."""
    encoder: tuple[str, ...] = ()
    """Encoders to choose from, named as for `braindino extract`: docs/encoders.md."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Of the encoders, such as `image_size=224`; of all of them."""
    features: tuple[Path, ...] = ()
    """Feature folders made by extract with these encoders: the nearest slices are searched in them."""
    prepared: Path | None = None
    """Folder made by `braindino prepare`: its scans can be opened, and neighbours among them shown."""
    sequence: str | None = None
    """Of the scan, where the encoder must know it (BM-MAE) and no table says it: T1, T1c, T2 or FLAIR."""
    device: str = "auto"
    """Where encoders run: `cpu`, `cuda`, `cuda:1`...; auto takes a GPU when there is one."""
    port: int = 0
    """0 takes one that is free."""
    browser: bool = True
    """Whether to open the page; its address is printed in any case."""

    def __post_init__(self) -> None:
        if self.scan is None and self.prepared is None:
            raise ValueError("nothing to look at: give a scan, or --prepared with a folder made by `braindino prepare`")
        for name in ("mask", "segmentation"):
            if getattr(self, name) is not None and self.scan is None:
                raise ValueError(f"--{name} belongs to a scan; give the scan too")
        if self.features and not self.encoder:
            raise ValueError("--features are searched with the encoder that made them; give it with --encoder")
        if self.sequence is not None and self.sequence not in SEQUENCES:
            raise ValueError(f"--sequence: found {self.sequence!r}; expected one of {', '.join(SEQUENCES)}")
        if self.port != 0 and not 1024 <= self.port <= 65535:
            raise ValueError(f"--port: found {self.port}; expected 1024 to 65535, or 0 for any that is free")


@command_line("view")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when it was ended (Ctrl-C), 1 on an error, before anything is served."""
    config = tyro.cli(ViewConfig, args=argv, prog="braindino view")
    session = build_session(config)
    with ViewServer(session, port=config.port) as server:
        print(f"view: {server.url}", flush=True)
        print("view: on this machine only; whoever has this address can look. Ctrl-C ends it.", flush=True)
        if config.browser and not webbrowser.open(server.url):
            print("view: no browser was found; open the address above in one", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("view: ended")
    return 0


def build_session(config: ViewConfig) -> Session:
    """Everything that is looked at, read and checked.

    Raises:
        ValueError: a file cannot be used, or does not belong to the others.
        OSError: a file is not there.
    """
    sources = prepared_sources(config.prepared) if config.prepared is not None else []
    if config.scan is not None:
        listed = [Source(scan.scan_id, scan) for folder in config.features for scan in FeatureTable(folder).scans]
        known = [*sources, *listed]
        given = given_source(config.scan, mask=config.mask, segmentation=config.segmentation, known=known)
        sources.insert(0, given)
    shelf = ScanShelf(sources)
    if config.scan is not None:
        shelf.open(GIVEN)
    options, device = parse_options(config.options), choose_device(config.device)
    encoders = []
    for number, name in enumerate(config.encoder):
        print(f"view: loading {name}", flush=True)
        encoder = load_volume_encoder(name, device=device, **options)
        if encoder.network is None:
            raise ValueError(f"--encoder {name}: its tokens are single numbers, which have no direction to compare")
        encoders.append(LoadedEncoder(f"encoder-{number}", encoder.identity.name, encoder, config.sequence))
    return Session(shelf, encoders, read_tables(config.features, encoders))


if __name__ == "__main__":
    raise SystemExit(main())
