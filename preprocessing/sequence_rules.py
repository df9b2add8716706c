"""What an MR series is, told from its description and its header by one ordered table.

Descriptions are written by hand at thousands of consoles. They are brought to one form first
(:func:`plain_description`), then the first rule of :data:`RULES` that fits decides; a cohort's own rules come before
these. A T1-weighted series that does not say whether contrast agent was given is decided by its header and by what else
was acquired in the same study (:func:`decide_contrast`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

MIN_IMAGES = 8
# A T1-weighted series of which nobody said whether contrast agent was given.
T1_UNDECIDED = "T1 or T1c"


class SeriesFacts(Protocol):
    """What the rules look at; :class:`braindino.preprocessing.dicom_series.Series` is one.

    ``tags`` are DICOM keywords -> text; ``order`` is the time and number within the study, empty and 0 if unknown.
    """

    @property
    def description(self) -> str: ...
    @property
    def modality(self) -> str: ...
    @property
    def num_images(self) -> int: ...
    @property
    def tags(self) -> Mapping[str, str]: ...
    @property
    def order(self) -> tuple[str, int]: ...


class GivenRule(Protocol):
    """A rule of a cohort's row; :class:`braindino.preprocessing.cohort_table.SequenceRule` is one."""

    @property
    def sequence(self) -> str: ...
    @property
    def reason(self) -> str: ...
    def fits(self, description: str, tags: Mapping[str, str], /) -> bool: ...


@dataclass(frozen=True)
class Verdict:
    """What a series is.

    Attributes:
        sequence: ``T1``, ``T1c``, ``T2``, ``FLAIR``, or :data:`T1_UNDECIDED`; empty for a series to leave.
        skip: why it is left, ``code: words``; empty for one to take.
        evidence: what decided.
    """

    sequence: str = ""
    skip: str = ""
    evidence: str = ""


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """Times of a contrast weighting, in ms; a time that the header lacks fits no range except ``ti=None``.

    Attributes:
        name: ``T1``, ``T2``, ``PD`` or ``FLAIR``.
        technique: pattern searched in ScanningSequence (``SE``, ``GR``, ``IR``, ``EP``...).
        tr, te, ti: ranges, both ends included; ``ti=None`` expects no inversion.
    """

    name: str
    technique: str
    tr: tuple[float, float]
    te: tuple[float, float]
    ti: tuple[float, float] | None = None


#: Read from the top. At 1.5 and 3 T; for series whose description says nothing, so only what is beyond doubt.
WEIGHTINGS = (
    Weighting(name="FLAIR", technique="SE|IR", tr=(4000, 20000), te=(60, 700), ti=(1500, 3000)),
    Weighting(name="T1", technique="GR", tr=(4, 3000), te=(0.5, 8), ti=(300, 1400)),
    Weighting(name="T1", technique="SE|IR", tr=(1200, 3500), te=(5, 40), ti=(400, 1300)),
    Weighting(name="T1", technique="SE", tr=(200, 1000), te=(3, 35)),
    Weighting(name="PD", technique="SE", tr=(1500, 10000), te=(5, 45)),
    Weighting(name="T2", technique="SE", tr=(1500, 15000), te=(65, 500)),
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the table: all that is given must fit.

    Attributes:
        text: pattern searched in the plain description.
        unless: pattern that must not be found in it.
        modality: pattern for the whole of Modality.
        image_type: pattern for the whole of one value of ImageType.
        weighting: what :func:`weighting_of` must say.
        max_images: most images that the series may have.
        take: the sequence it is.
        skip: ``code: words`` of the reason to leave it.
    """

    text: str = ""
    unless: str = ""
    modality: str = ""
    image_type: str = ""
    weighting: str = ""
    max_images: int = 0
    take: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        assert bool(self.take) != bool(self.skip), self
        assert self.text or self.modality or self.image_type or self.weighting or self.max_images, self


def _any(*words: str) -> str:
    """A pattern for any of ``words``, each at the beginning of a word."""
    return r"\b(" + "|".join(words) + ")"


# Words for "with contrast agent" and for "without", searched in plain descriptions.
_NOT_THE_AGENT = r"(?! ?(op|proc|er|ictal|surg|rt|xrt|chemo|tx|treat|rad|scan|fusion|sat))"
_AGENT = r" ?(contrast|con|c|gd|gad\w*|enhanced|inj\w*)\b"
POST = (
    _any(
        "post" + _NOT_THE_AGENT,
        "gad",
        r"gd\b",
        r"c ?\+",
        r"c[em]\b",
        r"t1 c\b",
        "with$",
        r"contrast\b",
        r"enhanced\b",
        "magnevist",
        "dotarem",
        "multihance",
        "prohance",
        "omniscan",
        r"km\b",
        r"mdc\b",
        r"with (c|gd|gad\w*|contrast|km|cm)\b",
    )
    + r"|\+ ?(c|gd|gad\w*|km|k|cm|ce|contrast)\b"
)
PRE = _any(
    "pre" + _NOT_THE_AGENT + _AGENT,
    "pre" + _NOT_THE_AGENT,
    "without" + _AGENT,
    r"without\b(?! (fat|fs|flow|fc|mt))",
    "non?" + _AGENT,
    "unenhanced",
    "nativ",
    r"plain\b",
)
# Names of T1-weighted techniques that do not say T1.
T1_NAMES = _any(
    "mp ?rage",
    r"(fast )?f?spgr\b",
    r"efgre ?3d\b",
    r"bravo\b",
    r"t1 ?ffe\b",
    r"tfl\b",
    "tfl ?3d",
    r"vibe\b",
    r"fl ?3d\b",
    r"mpr\b",
    r"3d ?tfe\b",
    r"tfe ?3d\b",
    r"mp2rage\b",
    r"ir ?f?spgr\b",
    r"lava\b",
    r"thrive\b",
    r"mt1\b",
)

FLAIR_NAMES = _any("flair", "dark ?fl", r"tirm\b", r"t2 dark\b", r"da fl\b", "fluid att")

#: What is no MR image, whatever it is called; before a cohort's own rules.
OBJECT_RULES: tuple[Rule, ...] = (
    Rule(modality="SEG|RTSTRUCT", skip="segmentation: regions, not an image"),
    Rule(
        modality="REG|KO|PR|SR|RTPLAN|RTDOSE|RTIMAGE|DOC|FID|RWV",
        skip="not_an_image: a DICOM object of another kind",
    ),
    Rule(modality="(?!MR$).*", skip="other_modality: not magnetic resonance"),
)  # fmt: skip

#: The first that fits decides: everything that names no structural weighting, then the four.
RULES: tuple[Rule, ...] = (
    Rule(
        text=_any(r"loc\b", "locali[sz]", "scout", "survey", "smart ?brain", "aa ?head", "plane ?loc",
            r"3 ?(pl|plane)\b", "plan scan", "autoalign", "vscout", "topogram", r"pilot\b"),
        skip="localiser: for planning",
    ),
    Rule(image_type="LOCALI[SZ]ER", skip="localiser: for planning"),
    Rule(
        text=_any("calib", "cal$", "cal (8|hd|head|nv|brain)", r"asset\b.*\bcal", "sense ref", "ref ?scan",
            "reference scan", "coil sens",
            "shim", "prescan", "phantom", r"noise\b", r"dummy\b", r"test\b", "field ?map", r"fmap\b", "b0 ?map",
            "b1 ?map", r"b1\+", "spin ?echo ?field"),
        skip="calibration: not a picture of anatomy",
    ),
    Rule(
        text=_any("screen ?(save|shot|cap)", "save screen", r"report\b", "key image", "secondary cap",
            "patient protocol", r"dose\b", "snapshot", "presentation", "annotat"),
        skip="not_an_image: a page or a screen",
    ),
    Rule(image_type="SCREEN ?SAVE|SCANNED|PASTED|REPORT", skip="not_an_image: a page or a screen"),
    Rule(text=_any(r"masks?\b", r"rois?\b", "brain ?mask"), skip="mask_or_roi: drawn, not acquired"),
    Rule(
        text=_any(r"seg\b", "segment", "label ?map", r"contours?\b", "rt ?struct"),
        skip="segmentation: regions, not an image",
    ),
    Rule(
        text=_any("spine", "spinal", "[ct] ?spine", "cervical", "thoracic", "lumbar", r"neck\b", "sacr", "knee",
            "abdomen", "pelvis"),
        skip="other_body_part: not the head",
    ),
    Rule(
        text=_any(r"sub\b", "subtr", r"subs\b", "post ?(-|minus) ?pre"),
        skip="subtraction: a difference of two series",
    ),
    Rule(image_type="SUBTRACT(ION)?|SUB", skip="subtraction: a difference of two series"),
    Rule(
        text=_any(r"[de]?adc\b", "apparent diff", r"dwi?\b", "diff", r"dti\b", r"dsi\b", r"dki\b", r"hardi\b",
            "tensor", r"trace\w*\b", r"fract\w* ?an", "fa ?map", r"colou?r ?fa\b",
            r"b ?(500|700|800|900|1000|1500|2000|3000)s?\b", r"\d+ ?dirs?\b", "isotropic image", "ep2d diff",
            r"resolve\b", r"ezz\b", r"ivim\b", "exp(onential)? ?(adc|att)"),
        skip="diffusion: DWI, DTI or a map of it",
    ),
    Rule(image_type="ADC|EADC|TRACEW?|DIFFUSION|FA|TENSOR.*", skip="diffusion: DWI, DTI or a map of it"),
    Rule(
        text=_any("perf", r"pwi\b", r"dsc\b", r"dce\b", r"p?c?asl\b", "pcasl", r"pasl\b", "pulsed asl",
            "spin label", r"r?cb[fv]\b", r"mtt\b", r"ttp\b", r"tmax\b", "ktrans", "k ?trans", r"kep\b", r"bolus\b",
            "time to peak", r"gbp\b", r"pbp\b", r"aif\b", r"twist\b", "cerebral blood", "leakage", "permeab",
            r"multi ?phase\b", r"dynamic\b", r"dyn\b", r"ve\b$", r"vp\b$", "relcb"),
        unless=_any("dynamic range"),
        skip="perfusion: DSC, DCE, ASL or a map of it",
    ),
    Rule(
        image_type="PERFUSION.*|R?CB[FV]|MTT|TTP|ASL|RELCB[FV]|TT0",
        skip="perfusion: DSC, DCE, ASL or a map of it",
    ),
    Rule(
        text=_any(r"mrs\b", r"mrsi\b", "spectro", r"csi\b", r"svs?\b", r"press\b", r"steam\b", r"voxel\b",
            r"probe\b", r"cho\b.*\b(naa|cr)\b", r"naa\b", "si voxel", "single ?voxel", "multi ?voxel"),
        skip="spectroscopy: MRS or its planning",
    ),
    Rule(
        text=_any(r"bold\b", r"\w*fmri", "resting", r"rest ?(state|ing)?\b", r"task\b", "finger", "verb gen",
            r"motor\b", "language", r"functional\b", "epi bold", "ep2d bold", r"fe epi\b"),
        skip="functional: BOLD",
    ),
    Rule(
        text=_any(r"mra\b", r"mrv\b", r"tof\b", "angio", r"cow\b", "circle of willis", "veno", "inhance",
            r"pc ?a\b", "venc", r"3dpc\b", r"pca?\b$", "phase contrast", "carotid", "arteri", r"tricks\b",
            r"cemra\b"),
        skip="angiography: MRA, MRV or TOF",
    ),
    Rule(
        text=_any(r"swi\b", r"swan\b", "suscept", r"min ?ip\b", r"t2 ?\*", "t2 ?star", r"t2 s\b",
            "t2 ?(gre|fl ?2d|ffe|hemo)", r"gre\b(?!.*\bt1\b)", "gradient echo", "grad(ient)? ?echo", r"hemo?\b",
            "haem", "hemorr", r"merge\b", r"medic\b", r"mpgr\b", "ven ?bold", r"qsm\b", r"sw\b", r"mpge\b",
            "graecho", r"fl2d(?!.*\bt1\b)", r"t1 ?\*"),
        unless=_any(r"t1\b", "mprage", "flair", "spgr"),
        skip="susceptibility: SWI, T2* or a gradient echo",
    ),
    Rule(
        text=_any(r"swi\b", r"t2 ?\*", "t2 ?star", r"min ?ip\b"),
        skip="susceptibility: SWI, T2* or a gradient echo",
    ),
    Rule(
        text=_any(r"phase\b(?! ?(enc|dir|over|array|a?p\b|r?l\b))", r"pha\b", r"real\b(?! ?(ir|recon))",
            r"imag(inary)?\b"),
        skip="phase: a phase, real or imaginary image",
    ),
    Rule(
        image_type=r"P|PHASE|PHASE MAP|R|I|REAL|IMAGINARY|R_\w+|I_\w+|P_\w+|VELOCITY|B0 MAP",
        skip="phase: a phase, real or imaginary image",
    ),
    Rule(
        text=_any(r"t[12] ?\*? ?maps?\b", r"mapping\b", "relax", r"molli\b", "despot", "qmap", r"magic\b", "synth",
            r"mtr\b", r"mt (on|off)\b", "mag ?transfer", "magneti[sz]ation transfer", "quantitative", "myelin",
            r"cest\b", r"apt ?w?\b", "fat ?frac", "param(etric)? ?map", "colou?r ?map", "t[12] calc",
            r"(inv|ti) ?[12]\b"),
        skip="quantitative_map: a map or a part of one",
    ),
    Rule(
        image_type="T[12] MAP|T2_STAR MAP|MTR|R[12]_MAP|T1_MAP|T2_MAP",
        skip="quantitative_map: a map or a part of one",
    ),
    Rule(
        text=_any(r"mips?\b", "reformat", "refmt", "rfmt", "reconst", r"recons?\b", r"mprs\b",
            "mpr (cor|sag|tra|ax|thick|range|rang|3d recon)", "mpr ?range",
            r"(cor|sag|ax|tra|coronal|sagittal|axial|obl|oblique) mprs?\b(?! ?rage)", "curved", "vol ?rend",
            r"vrt?\b", "projection", "3d ?view", r"surface\b", "obl(ique)? ref", "mpr recon", "thick mpr",
            r"mp ?rage.* mpr\b",
            "collage", r"fused?\b", r"fusion\b"),
        unless=_any(r"t1 mpr\b", r"t1 (ax|axial|cor|coronal|sag|sagittal|tra) mpr\b"),
        skip="derived_reformat: MIP, MPR or another view of a series",
    ),
    Rule(
        image_type="MPR|CSA MPR|REFORMATTED|CSA RESAMPLED|RESAMPLED|PROJECTION IMAGE|MIN IP|MINIP|MAX_IP|MIP|"
                   "MNIP|VOLREN|CSAPARALLEL|CSAMANUAL|3DREF|CURVED",
        skip="derived_reformat: MIP, MPR or another view of a series",
    ),
    Rule(image_type="MOSAIC", skip="functional: mosaics of an EPI series"),
    Rule(
        text=_any(r"iac'?s?\b", "orbit", "pituit", "sella", r"optic\b", r"\w*hippo", "temporal lobe",
            "cranial nerve", "skull base", r"tmj\b", "sinus", r"face\b", "parotid"),
        skip="partial_coverage: a part of the brain only",
    ),
    Rule(
        text=_any(r"stir\b", r"tirm\b(?!.*\bfl|.*dark)", "double inversion", r"dir\b", r"psir\b", r"ciss\b",
            "fiesta", r"drive\b", r"trufi\b", r"bffe\b", r"b ?ffe\b", r"ssfp\b", "true ?fisp", r"flaws\b",
            r"fgatir\b", r"ute\b", r"zte\b", r"cine\b", "fast ?stir"),
        unless=_any(r"flair\b"),
        skip="other_weighting: none of T1, T1c, T2 and FLAIR",
    ),
    Rule(
        text=_any(r"pd\b.*\bt2\b", r"t2\b.*\bpd\b", r"proton.*\bt2\b", r"t2\b.*\bproton",
            "dual ?(echo|fse|tse|contrast)", "double (echo|tse|fse)", "pd ?t2", "dp ?t2", r"(tse|fse) ?de\b",
            r"de ?(tse|fse)\b", "pdt2"),
        skip="proton_density: proton density and T2 in one series",
    ),
    Rule(
        text=_any(r"pdw?\b", "proton", "pd ?(fs|tse|fse|w)", r"rho\b", r"dp\b"),
        skip="proton_density: not among the four",
    ),
    Rule(
        text=_any(r"ep2d\b", r"epi\b(?!.*\bflair)"),
        unless=_any(r"t1\b", "epi ?t2"),
        skip="functional: an EPI series of unknown kind",
    ),
    Rule(max_images=MIN_IMAGES - 1, skip=f"too_few_slices: fewer than {MIN_IMAGES} images"),
    # GE calls an inversion-prepared T1 "T1 FLAIR".
    Rule(text=_any(r"t1\b.*\bflair", r"flair\b.*\bt1\b"), unless=_any(r"t2\b"), take=T1_UNDECIDED),
    Rule(text=FLAIR_NAMES, weighting="T1", take=T1_UNDECIDED),
    Rule(text=FLAIR_NAMES, take="FLAIR"),
    Rule(text=_any(r"t1\b.*\bt2\b", r"t2\b.*\bt1\b"), skip="unknown_sequence: it names two weightings"),
    Rule(text=_any(r"t2\b"), take="T2"),
    Rule(text=_any(r"t1\b"), take=T1_UNDECIDED),
    Rule(text=T1_NAMES, unless=_any(r"t2\b"), take=T1_UNDECIDED),
    # From here on the description names no weighting.
    Rule(weighting="FLAIR", take="FLAIR"),
    Rule(weighting="T1", take=T1_UNDECIDED),
    Rule(weighting="PD", skip="proton_density: by its TR and TE"),
    Rule(weighting="T2", take="T2"),
)  # fmt: skip


def classify(series: SeriesFacts, given: Iterable[GivenRule] = ()) -> Verdict:
    """What ``series`` is by itself; ``given`` are the cohort's own rules, which come before :data:`RULES`.

    The description counts; the protocol's name stands in for a missing one only, since it may name the whole
    examination ("brain w/wo").
    """
    text = plain_description(series.description or series.tags.get("ProtocolName", ""))
    weighting = weighting_of(series.tags)
    image_type = [value.strip().upper() for value in series.tags.get("ImageType", "").split("\\")]

    def first_of(rules: Iterable[Rule]) -> Rule | None:
        return next((rule for rule in rules if _fits(rule, text, series, weighting, image_type)), None)

    rule = first_of(OBJECT_RULES)
    own = None if rule else next((own for own in given if own.fits(series.description, series.tags)), None)
    if own is not None:
        words = f"the cohort's rule for {series.description!r}"
        return Verdict(own.sequence, "", words) if own.sequence else Verdict("", own.reason, words)
    rule = rule or first_of(RULES)
    if rule is None:
        # No text of the series: reasons are counted by their words.
        return Verdict(skip="unknown_sequence: neither its description nor its times tell")
    evidence = repr(text) if rule.text else "its header"
    if rule.skip:
        return Verdict("", rule.skip, evidence)
    if rule.take != T1_UNDECIDED:
        return Verdict(rule.take, "", evidence)
    return Verdict({True: "T1c", False: "T1", None: T1_UNDECIDED}[says_contrast(text)], "", evidence)


def decide_contrast(study: Sequence[tuple[SeriesFacts, Verdict]]) -> list[Verdict]:
    """The verdicts of one study's series, with T1 or T1c decided where a series by itself does not tell.

    In this order: before a series that says "without" there was no agent; after one that says "with", or after a
    bolus for perfusion imaging, there was; otherwise the header's ContrastBolusAgent counts, unless it stands in a
    series that says "without", too (some consoles enter it for the whole examination); and without any of these, no
    agent was given.
    """
    order = _order([facts for facts, _ in study])
    without = [facts for facts, verdict in study if verdict.sequence == "T1"]
    last_without = max((order[id(facts)] for facts in without if order), default=None)
    first_with = min(
        (order[id(facts)] for facts, verdict in study if order and _shows_agent(facts, verdict)), default=None
    )
    agent_counts = not any(has_agent(facts.tags) for facts in without)
    verdicts = []
    for facts, verdict in study:
        if verdict.sequence != T1_UNDECIDED:
            verdicts.append(verdict)
            continue
        if last_without is not None and order[id(facts)] < last_without:
            sequence, why = "T1", "before a series without contrast agent"
        elif first_with is not None and order[id(facts)] > first_with:
            sequence, why = "T1c", "after contrast agent was given"
        elif agent_counts and has_agent(facts.tags):
            sequence, why = "T1c", "ContrastBolusAgent"
        else:
            sequence, why = "T1", "nothing says contrast agent"
        verdicts.append(replace(verdict, sequence=sequence, evidence=f"{verdict.evidence}, {why}"))
    return verdicts


def weighting_of(tags: Mapping[str, str]) -> str:
    """``T1``, ``T2``, ``PD`` or ``FLAIR`` by ScanningSequence, TR, TE and TI; empty where they leave a doubt."""
    technique = tags.get("ScanningSequence", "").upper()
    tr, te, ti = (_number(tags.get(name, "")) for name in ("RepetitionTime", "EchoTime", "InversionTime"))
    for row in WEIGHTINGS:
        if (
            re.search(row.technique, technique)
            and _within(tr, row.tr)
            and _within(te, row.te)
            and (not ti if row.ti is None else _within(ti, row.ti))
        ):
            return row.name
    return ""


def says_contrast(plain: str) -> bool | None:
    """Whether a plain description says that contrast agent was given; None where it says nothing, or both."""
    rest, without = _PRE.subn(" ", plain)
    return None if bool(without) == bool(_POST.search(rest)) else not without


def has_agent(tags: Mapping[str, str]) -> bool:
    """Whether the header names a contrast agent."""
    agent = tags.get("ContrastBolusAgent", "").strip().lower()
    return bool(re.search(r"[a-z1-9]", agent)) and not re.fullmatch(
        r"n|no|none|na|n/?a|null|unknown|off|without.*", agent
    )


_PRE, _POST = re.compile(PRE), re.compile(POST)
_BOLUS = re.compile(r"\b(asl|pasl|pcasl|spin label)")
_SPLITS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"(?<![a-z0-9])w\s*[/_-]?\s*o(?![a-z0-9])", " without "),
        (r"(?<![a-z0-9])w\s*/\s*", " with "),
        (r"(?<![a-z0-9])c-(?![a-z0-9])", " without c "),
        (r"[_\-/\\.,;:()\[\]{}<>=&|#@!?\"^~']+", " "),
        # Words that consoles glue together. "post1" is no T1: only whole words before it count.
        (
            r"(?<![a-z])(e|s|d|o?ax|axial|tra|trans|cor|coronal|sag|sagittal|se|tse|fse|fl|ir|fs|iso|vol|pre|post|gad|gd"
            r"|brain|head|wm|flair|obl|nav|thin)(?=t[12](?![0-9]))",
            r"\1 ",
        ),
        (r"(?<![a-z0-9])([23]d)(?=[a-z0-9])", r"\1 "),
        (r"(?<=[a-z0-9])([23]d)(?![a-z0-9])", r" \1"),
        (r"(?<![a-z])(o?ax|axial|tra|cor|coronal|sag|sagittal)(?=[23]d|t[12](?![0-9])|flair|mprage|post|pre)", "\\1 "),
        (r"(?<=3d )(ax|cor|sag|tra)(?=[a-z0-9])", r"\1 "),
        (r"(?<![a-z0-9])t([12])(?=[a-z]|[23]d)", r"t\1 "),
        (r"\bt([12]) (wi?|weighted|wtd|wgt|gew)(?![a-z])", r"t\1"),
        (r"\bt([12]) w(?=(se|tse|fse|tfe|ffe|flair|3d|2d|ir)\b)", r"t\1 "),
        (r"\bt2 *stars?(?![a-z])", " t2* "),
        # The name of an examination, which says nothing about the series.
        (r"\bwith( and)? without\b|\bwithout( and)? with\b(?! (c|gad|gd)\b)", " "),
    )
)


def plain_description(text: str) -> str:
    """``text`` in lower case with its words apart: ``3DSAGT2SPACE`` gives ``3d sag t2 space``, ``Ax_T1W+C`` gives
    ``ax t1+c``."""
    text = text.lower()
    for pattern, by in _SPLITS:
        text = pattern.sub(by, text)
    return " ".join(text.split())


def _fits(rule: Rule, text: str, series: SeriesFacts, weighting: str, image_type: Sequence[str]) -> bool:
    return (
        not (rule.text and not re.search(rule.text, text))
        and not (rule.unless and re.search(rule.unless, text))
        and not (rule.modality and not re.fullmatch(rule.modality, series.modality))
        and not (rule.image_type and not any(re.fullmatch(rule.image_type, value) for value in image_type))
        and not (rule.weighting and rule.weighting != weighting)
        # 0 images: nobody has counted them.
        and not (rule.max_images and not 0 < series.num_images <= rule.max_images)
    )


def _order(study: Sequence[SeriesFacts]) -> dict[int, tuple[str, int]]:
    """``id`` of each series -> its place in the study: by time, by number where one lacks its time, empty where one
    lacks both."""
    if all(facts.order[0] for facts in study):
        return {id(facts): facts.order for facts in study}
    if all(facts.order[1] for facts in study):
        return {id(facts): ("", facts.order[1]) for facts in study}
    return {}


def _shows_agent(facts: SeriesFacts, verdict: Verdict) -> bool:
    bolus = verdict.skip.startswith("perfusion") and not _BOLUS.search(plain_description(facts.description))
    return bolus or verdict.sequence == "T1c"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _within(value: float | None, bounds: tuple[float, float]) -> bool:
    return value is not None and bounds[0] <= value <= bounds[1]
