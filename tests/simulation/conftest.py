"""One small cohort on coarse grids, made once for all tests of the room."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from braindino.simulation.anatomy import Template, load_template
from braindino.simulation.protocols import PROTOCOLS, Protocol
from braindino.simulation.simulate import simulate_cohort
from braindino.simulation.subjects import Subject

# The real sites with voxels of about 3 mm: eight times fewer, everything else as it is.
COARSE = tuple(
    replace(
        protocol,
        spacing=(2.8, 2.8, max(2.8, protocol.spacing[2])),
        thickness=protocol.thickness if protocol.spacing[2] > 2.8 else 2.8,
    )
    for protocol in PROTOCOLS
)


@dataclass(frozen=True)
class Cohort:
    folder: Path
    subjects: list[Subject]
    protocols: tuple[Protocol, ...]
    seed: int


@pytest.fixture(scope="session")
def template() -> Template:
    return load_template()


@pytest.fixture(scope="session")
def coarse() -> tuple[Protocol, ...]:
    return COARSE


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort")
    subjects = simulate_cohort(folder, num_subjects=6, seed=3, jobs=2, protocols=COARSE)
    return Cohort(folder, subjects, COARSE, 3)
