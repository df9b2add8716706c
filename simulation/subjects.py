"""Who is in a simulated cohort: age, sex, site, illness, visits and outcome of every subject."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from braindino.simulation.anatomy import AGE_RANGE, Person, draw_person
from braindino.simulation.protocols import Protocol
from braindino.simulation.tumor import Tumor, draw_tumor, grow

DAYS_PER_YEAR = 365.25

# Every five subjects hold three tumours, of either mutation in turn, and two people with a second visit, so that small
# cohorts are balanced too. Which of the five is drawn.
ILLNESSES = (("wildtype", "mutant", "wildtype", None, None), ("mutant", "wildtype", "mutant", None, None))
RETURNING = (True, True, False, False, False)
# Survival is Weibull: days = scale * (exponential / risk) ** (1 / shape); log(risk) grows with age and necrosis.
SURVIVAL_SCALE, SURVIVAL_SHAPE = 900.0, 1.5
RISK_PER_YEAR, RISK_PER_NECROSIS = 0.03, 3.5
FOLLOW_UP_DAYS = (300.0, 2500.0)
GROWTH_PER_YEAR = {"mutant": (0.03, 0.08), "wildtype": (0.06, 0.16)}


@dataclass(frozen=True)
class Visit:
    """One session."""

    name: str
    """``ses-1`` or ``ses-2``."""
    age: float
    """Years."""
    tumor: Tumor | None
    """The tumour as it is at this visit."""


@dataclass(frozen=True)
class Subject:
    """One person: a row of ``participants.tsv``."""

    name: str
    """``sub-0001`` and so on."""
    age: float
    """Years at the first visit."""
    sex: str
    """``F`` or ``M``."""
    protocol: Protocol
    """The site's protocol, the same at all visits."""
    person: Person
    """Shape of the brain."""
    idh: str | None
    """``mutant`` or ``wildtype``; None without a tumour."""
    survival_days: int | None
    """Days from the first visit to death or the last contact; None without a tumour."""
    event: int | None
    """1 when ``survival_days`` ends in death, 0 when it is censored; None without a tumour."""
    visits: tuple[Visit, ...]
    """One or two."""


def draw_subject(seed: int, index: int, *, protocols: Sequence[Protocol], tumor_sites: np.ndarray) -> Subject:
    """Subject number ``index`` (from 0) of the cohort of that seed, whatever the size of the cohort.

    Args:
        seed: of the cohort.
        index: of the subject.
        protocols: the sites.
        tumor_sites: (n, 3) template mm where tumours may start.
    """
    illness, returns = _place_in_block(seed, index)
    block, place = divmod(index, len(protocols))
    protocol = protocols[_design_generator(seed, 1, block).permutation(len(protocols))[place]]
    # Steps of the golden ratio spread any number of subjects evenly over the ages.
    quantile = (_design_generator(seed, 2).uniform() + index * (np.sqrt(5) - 1) / 2) % 1.0
    age = round(float(AGE_RANGE[0] + quantile * (AGE_RANGE[1] - AGE_RANGE[0])), 1)

    rng = visit_generator(seed, index, 0)
    sex = "FM"[_design_generator(seed, 3, index // 2).permutation(2)[index % 2]]
    person = draw_person(rng, sex=sex)
    gap = float(rng.uniform(1.0, 2.0))
    visits = [Visit("ses-1", age, None)]
    survival_days = event = None
    later_tumor = None
    if illness is not None:
        tumor = draw_tumor(rng, idh=illness, sites=tumor_sites)
        later_tumor = grow(tumor, years=gap, rate=float(rng.uniform(*GROWTH_PER_YEAR[illness])))
        visits = [Visit("ses-1", age, tumor)]
        survival_days, event = _draw_survival(rng, age=age, necrosis_share=tumor.necrosis_share)
        returns = returns and survival_days > gap * DAYS_PER_YEAR
    if returns:
        visits.append(Visit("ses-2", round(age + gap, 1), later_tumor))
    return Subject(
        name=f"sub-{index + 1:04d}",
        age=age,
        sex=sex,
        protocol=protocol,
        person=person,
        idh=illness,
        survival_days=survival_days,
        event=event,
        visits=tuple(visits),
    )


def visit_generator(seed: int, index: int, visit: int) -> np.random.Generator:
    """The random numbers of one subject (visit 0) or one visit (from 1), independent of all others."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, index, visit)))


def _design_generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, *key)))


def _place_in_block(seed: int, index: int) -> tuple[str | None, bool]:
    """Illness and whether a second visit is planned."""
    block, place = divmod(index, len(RETURNING))
    rng = _design_generator(seed, 0, block)
    illnesses = ILLNESSES[block % len(ILLNESSES)]
    return illnesses[rng.permutation(len(illnesses))[place]], RETURNING[rng.permutation(len(RETURNING))[place]]


def _draw_survival(rng: np.random.Generator, *, age: float, necrosis_share: float) -> tuple[int, int]:
    risk = np.exp(RISK_PER_YEAR * (age - 52) + RISK_PER_NECROSIS * (necrosis_share - 0.25))
    death = SURVIVAL_SCALE * (rng.exponential() / risk) ** (1 / SURVIVAL_SHAPE)
    contact_ends = rng.uniform(*FOLLOW_UP_DAYS)
    return max(1, round(min(death, contact_ends))), int(death <= contact_ends)
