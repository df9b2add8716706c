"""What tests of several rooms need."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No sandbox: Chromium refuses to start as root with one. SwiftShader: WebGL 2 without a graphics card.
BROWSER_FLAGS = (
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)


@pytest.fixture
def one_thread():
    """On small arrays the threads of torch cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hears_ctrl_c():
    """For programs that are to be stopped: background jobs of a shell are deaf to Ctrl-C, and so is what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Read by Triton when it is first imported, for the whole process: where there is a GPU its kernels are compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
KERNEL_USERS = (
    "braindino.vision_transformer",
    "braindino.pretrain.augment",
    "braindino.pretrain.prototypes",
    "nnunet_braindino.decoder",
)


@pytest.fixture
def interpreted_kernels(monkeypatch):
    """GPU kernels run, by Triton's interpreter, on the CPU. Skips where there is no Triton, or a GPU for it."""
    pytest.importorskip("triton", reason="needs Triton, which PyTorch's CUDA builds bring along")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: see the tests marked gpu")
    for name in KERNEL_USERS:
        monkeypatch.setattr(f"{name}.own_kernels", lambda x: True)


@dataclass
class WatchedPage:
    """A page of its own browser context, and what it said and asked for.

    Attributes:
        page: Playwright's page, to drive it.
        errors: messages of console errors, exceptions that nobody caught, and requests that failed.
        requests: addresses of everything the page asked for.
    """

    page: "Page"
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium() -> "Iterator[Browser]":
    """A headless Chromium of this machine; ``BRAINDINO_CHROMIUM`` names another. Skips where there is none."""
    program = os.environ.get("BRAINDINO_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}, or name one in BRAINDINO_CHROMIUM")
    # Here, not above: most tests need no browser.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(BROWSER_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def chromium_page(chromium: "Browser") -> Iterator[WatchedPage]:
    """A fresh page, 1280 x 800, that records its errors and its requests."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    watched = WatchedPage(page)
    page.on("console", lambda said: watched.errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("requestfailed", lambda request: watched.errors.append(f"{request.url}: {request.failure}"))
    page.on("request", lambda request: watched.requests.append(request.url))
    yield watched
    context.close()
