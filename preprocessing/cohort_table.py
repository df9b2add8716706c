"""The cohorts as a table: one YAML file a cohort, which says how its files, identifiers and labels are read.

A row needs no code. Those of the paper lie in ``cohorts/``; a user's own file of the same form is named by its path.
Owner of the form (version 1): every key is described at the class it fills, and an unknown key is an error.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from braindino.manifest import SEQUENCES
from braindino.records import read_yaml

COHORTS_DIR = Path(__file__).with_name("cohorts")
READERS = ("bids", "template", "loni", "dicom", "fastmri")
READERS_OF_MEMBERS = ("bids", "template")
ROLES = ("pretraining", "downstream")
ACCESS = ("open", "registration", "agreement", "controlled")
PATTERN_GROUPS = ("subject", "session", "sequence", "description")
KINDS_OF_COLUMN = ("text", "number", "date")
DERIVATIONS = {"first_of": ("columns",), "years_between": ("start", "end"), "event_within": ("time", "event", "days")}

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_CODE = re.compile(r"[a-z][a-z0-9_]*")
_COLUMN = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class IdRule:
    """How an identifier is made from what a path, a header or a table says; by default it is taken as it is.

    Attributes:
        pattern: must match the whole text, in any case; the group ``id`` (without one: the whole match) is what counts.
        pad: digits to which it is filled up with zeros from the left.
        prefix: put before it.
        case: ``upper`` or ``lower``; empty leaves it.
        date: ``strptime`` formats of a date, in the order they are tried; the identifier is then the ISO date.
        optional: text that ``pattern`` does not match gives an empty identifier instead of an error.
    """

    pattern: re.Pattern[str] | None = None
    pad: int = 0
    prefix: str = ""
    case: str = ""
    date: tuple[str, ...] = ()
    optional: bool = False

    def read(self, text: str) -> str:
        """The identifier.

        Raises:
            ValueError: ``text`` is not of the form that the rule expects.
        """
        text = text.strip()
        if self.pattern is not None:
            match = self.pattern.fullmatch(text)
            if match is None:
                if self.optional:
                    return ""
                raise ValueError(f"found {text!r}; expected {self.pattern.pattern!r}")
            text = match["id"] if "id" in self.pattern.groupindex else match[0]
        if not text:
            if self.optional:
                return ""
            raise ValueError("found nothing; expected an identifier")
        if self.date:
            text = iso_date(text, self.date)
        text = self.prefix + text.zfill(self.pad)
        return text.upper() if self.case == "upper" else text.lower() if self.case == "lower" else text


def iso_date(text: str, formats: Sequence[str]) -> str:
    """The day that ``text`` names in one of ``formats``, as ``YYYY-MM-DD``; ISO dates are always understood.

    Raises:
        ValueError: it names none.
    """
    for form in ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S", *formats):
        try:
            return datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    raise ValueError(f"found {text!r}; expected a date as {' or '.join(formats)}")


@dataclass(frozen=True, kw_only=True)
class KeyColumn:
    """Where a label table says whom a row is about.

    Attributes:
        column: its names in the releases of the table, the first that is there counts; none where ``constant`` says it.
        rule: how the identifier is made from the cell; the result is what the files' subject or session is called.
        constant: the same for every row of the table.
        within_days: for sessions that are ISO dates: the row also stands for the sessions of other tables that are
            at most so many days away, the nearest row for each; 0 takes the date as it is.
    """

    column: tuple[str, ...] = ()
    rule: IdRule = IdRule()
    constant: str = ""
    within_days: int = 0


@dataclass(frozen=True, kw_only=True)
class SkipRule:
    """Files to leave.

    Attributes:
        pattern: searched, in any case, in the file's path below its source (with ``/``).
        code: reason code, as in ``scans.tsv``.
        words: the reason for a reader.
    """

    pattern: re.Pattern[str]
    code: str
    words: str

    @property
    def reason(self) -> str:
        """``code: words``."""
        return f"{self.code}: {self.words}"


@dataclass(frozen=True, kw_only=True)
class SequenceRule:
    """What a series is by its description and header; the first rule of a list that fits decides.

    Attributes:
        pattern: searched, in any case, in the series description; None fits any.
        tags: DICOM keyword -> pattern searched in its value (several values joined with a backslash, a missing tag is
            empty); all must fit.
        sequence: ``T1``, ``T1c``, ``T2`` or ``FLAIR``; empty: the series is left with ``code`` and ``words``.
        code, words: the reason, of a rule that leaves.
    """

    pattern: re.Pattern[str] | None = None
    tags: tuple[tuple[str, re.Pattern[str]], ...] = ()
    sequence: str = ""
    code: str = ""
    words: str = ""

    def fits(self, description: str, tags: Mapping[str, str]) -> bool:
        """Whether a series of this description and these tags (keyword -> text) is meant."""
        if self.pattern is not None and not self.pattern.search(description):
            return False
        return all(pattern.search(tags.get(keyword, "")) for keyword, pattern in self.tags)

    @property
    def reason(self) -> str:
        """``code: words`` of a rule that leaves."""
        return f"{self.code}: {self.words}"


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Which of several scans of one subject, session and sequence are taken; the others are left as ``repeat``.

    Attributes:
        keep: ``all``, or the ``first`` or ``last`` by ``prefer``, then by path with numbers in their order.
        per: ``session``, or ``subject`` for one scan per subject and sequence (first: of the earliest session).
        prefer: patterns searched in the path (series: in the description); a scan that fits an earlier one comes
            first, one that fits none last.
    """

    keep: str = "all"
    per: str = "session"
    prefer: tuple[re.Pattern[str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """One standard column of the tidy label table.

    Attributes:
        name: with its unit where it has one: ``age_years``, ``sex``, ``os_days``.
        column: its names in the releases of the published table, the first that is there counts; none for derived ones.
        optional: whether a release may lack it.
        kind: ``text``, ``number`` or ``date``.
        values: published cell -> what is written; without any, cells are written as they are.
        otherwise: what is written for cells that ``values`` does not name; without it, such cells are told and missing.
        missing: cells that stand for no value, besides empty ones.
        factor: a number is multiplied by it: the change of unit.
        date: ``strptime`` formats of a date, in the order they are tried.
        derive: ``first_of`` (``columns``: the first that is there), ``years_between`` (``start``, ``end``: dates, in
            years of 365.25 days) or ``event_within`` (``time`` in days, ``event`` 0/1, ``days``: 1 for an event by
            then, 0 for a longer time, missing if followed for less). Its arguments name columns further up.
        arguments: of ``derive``.
        write: whether it goes into the tidy table, or only into derived columns.
    """

    name: str
    column: tuple[str, ...] = ()
    optional: bool = False
    kind: str = "text"
    values: tuple[tuple[str, str], ...] = ()
    otherwise: str = ""
    missing: tuple[str, ...] = ()
    factor: float = 1.0
    date: tuple[str, ...] = ()
    derive: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    write: bool = True


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """One published table of labels.

    Attributes:
        files: pattern searched, in any case, in the names of files: which file is this table.
        subject, session: whom a row is about; session None: the subject as a whole.
        columns: what it says.
        encoding: of a text file.
        sheet: of a workbook; empty: the first.
        where: column -> pattern that its cell must match as a whole; other rows are not meant and not counted.
        contradictions: of two rows about the same: ``error``, or ``missing`` to write neither and tell.
    """

    files: re.Pattern[str]
    subject: KeyColumn
    session: KeyColumn | None = None
    columns: tuple[LabelColumn, ...] = ()
    encoding: str = "utf-8-sig"
    sheet: str = ""
    where: tuple[tuple[str, re.Pattern[str]], ...] = ()
    contradictions: str = "error"


@dataclass(frozen=True, kw_only=True)
class CohortRow:
    """One dataset. A file may begin with ``extends: NAME``: it then changes single keys of that row.

    Attributes:
        name: lower-case letters, digits and hyphens; the cohort of its scans.
        title: what it is, in words.
        roles: ``pretraining``, ``downstream``: what the paper uses it for under this name. Empty for parts of others.
        paper: section of the paper.
        numbers: what the paper counts, in words -> number.
        reader: ``bids``, ``template``, ``loni``, ``dicom`` or ``fastmri``; empty for a row of ``members``.
        members: rows that make up this one; each file goes to the first that knows it.
        known_by: for a part of another row: pattern searched in the whole path, which tells its images and tables from
            those of the other parts.
        layout: the published folders, for messages and readers.
        sequences: the sequences it is taken for; scans of others are left.
        patterns: regular expressions that match the end of a path (with ``/``, in any case), with the groups
            ``subject`` and, where the path tells, ``session``, ``sequence``, ``description``. The first that fits
            counts. For ``template``, and where needed for the other readers.
        subject, session: how their identifiers are made from what the reader finds (group, BIDS entity, DICOM tag).
        sequence_of: text of the group ``sequence``, in lower case -> sequence.
        sequence_rules: for series: what their descriptions and tags mean, before the general rules.
        skip: what to leave, in order; the first that fits counts.
        repeats: which repeats to take.
        geometry: what the files do not say or say wrongly: parameters of the conversion of Analyze and fastMRI files.
        labels: the published tables.
        access: ``open``, ``registration``, ``agreement`` or ``controlled``.
        terms: licence or agreement.
        url: where it comes from.
        overlaps: other row -> how it shares subjects.
        notes: what to know; those that begin with ``unverified:`` are from memory.
        path: the YAML file.
    """

    name: str
    title: str
    roles: tuple[str, ...] = ()
    paper: str = ""
    numbers: tuple[tuple[str, int | str], ...] = ()
    reader: str = ""
    members: tuple[str, ...] = ()
    known_by: re.Pattern[str] | None = None
    layout: str = ""
    sequences: tuple[str, ...] = SEQUENCES
    patterns: tuple[re.Pattern[str], ...] = ()
    subject: IdRule = IdRule()
    session: IdRule = IdRule(optional=True)
    sequence_of: tuple[tuple[str, str], ...] = ()
    sequence_rules: tuple[SequenceRule, ...] = ()
    skip: tuple[SkipRule, ...] = ()
    repeats: Repeats = Repeats()
    geometry: tuple[tuple[str, Any], ...] = ()
    labels: tuple[LabelTable, ...] = ()
    access: str = ""
    terms: str = ""
    url: str = ""
    overlaps: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    path: str = ""


def load_cohort(name_or_path: str) -> CohortRow:
    """The row of that name, or in that YAML file (anything with a ``/`` or ending in ``.yaml`` or ``.yml``).

    Raises:
        ValueError: no such row (names the close ones) or file, or the file is not of the form; names file and key.
        OSError: the file cannot be read.
    """
    if "/" in name_or_path or name_or_path.lower().endswith((".yaml", ".yml")):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ValueError(f"--cohort {name_or_path!r}: no such file; expected a YAML file with a cohort")
        return _read_row(path)
    name = name_or_path.lower().replace("_", "-")
    paths = {path.stem: path for path in COHORTS_DIR.glob("*.yaml")}
    if name not in paths:
        # Two names that share their letters are meant more often than two that share their order.
        close = difflib.get_close_matches(name, sorted(paths), n=3, cutoff=0.5)
        hint = f", did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(
            f"--cohort {name_or_path!r}: no such cohort{hint} "
            "`braindino cohorts` lists them; a cohort of your own is a YAML file (--cohort path/to/mine.yaml), and "
            "--cohort-name only gives a dataset its name"
        )
    return _read_packaged_row(paths[name])


def list_cohorts() -> list[CohortRow]:
    """All rows that come with the program, sorted by name."""
    return [load_cohort(path.stem) for path in sorted(COHORTS_DIR.glob("*.yaml"))]


@cache
def _read_packaged_row(path: Path) -> CohortRow:
    return _read_row(path)


def _read_row(path: Path) -> CohortRow:
    content = read_yaml(path)
    row = _Mapping(content, str(path), "the file")
    if row.has("extends"):
        row.content = {**_packaged_content(row.text("extends")), **row.content}
    members, reader = row.texts("members"), row.choice("reader", ("", *READERS))
    if bool(members) == bool(reader):
        raise row.error(f"found reader {reader!r} and members {list(members)}; expected one of the two")
    result = CohortRow(
        name=row.text("name", required=True, form=_NAME),
        title=row.text("title", required=True),
        roles=row.choices("roles", ROLES),
        paper=row.text("paper"),
        numbers=row.pairs("numbers"),
        reader=reader,
        members=members,
        known_by=row.regex("known_by"),
        layout=row.text("layout"),
        sequences=row.choices("sequences", SEQUENCES) or SEQUENCES,
        patterns=_patterns(row),
        subject=_id_rule(row.mapping("subject")) if row.has("subject") else IdRule(),
        session=_id_rule(row.mapping("session")) if row.has("session") else IdRule(optional=True),
        sequence_of=tuple((key.lower(), row.one_of(f"sequence_of.{key}", value, SEQUENCES)) for key, value in
                          row.pairs("sequence_of")),
        sequence_rules=tuple(map(_sequence_rule, row.mappings("sequence_rules"))),
        skip=tuple(map(_skip_rule, row.mappings("skip"))),
        repeats=_repeats(row.mapping("repeats")) if row.has("repeats") else Repeats(),
        geometry=tuple(sorted((key, _plain(value)) for key, value in row.pairs("geometry"))),
        labels=tuple(map(_label_table, row.mappings("labels"))),
        access=row.choice("access", ("", *ACCESS)),
        terms=row.text("terms"),
        url=row.text("url"),
        overlaps=row.pairs("overlaps"),
        notes=row.texts("notes"),
        path=str(path),
    )  # fmt: skip
    row.finish()
    if result.reader == "bids" and result.patterns:
        raise row.error("reader 'bids' takes no patterns: names say everything")
    if result.reader == "template" and not result.patterns:
        raise row.error("reader 'template' needs patterns")
    if result.reader == "template" and len(result.sequences) > 1:
        for pattern in result.patterns:
            if "sequence" not in pattern.groupindex:
                raise row.error(
                    f"pattern {pattern.pattern!r} has no group 'sequence' and the row has the sequences "
                    f"{list(result.sequences)}; expected the group, or one sequence"
                )
    for member in members:
        if load_cohort(member).reader not in READERS_OF_MEMBERS:
            raise row.error(f"member {member!r} is read by {load_cohort(member).reader!r}; expected bids or template")
    return result


def _packaged_content(name: str) -> dict[str, Any]:
    """What a row that comes with the program says, to be changed by one that extends it."""
    path = Path(load_cohort(name).path)
    # What the row is to the paper does not pass on to its variants.
    return {key: value for key, value in read_yaml(path).items() if key not in ("roles", "numbers")}


def _patterns(row: "_Mapping") -> tuple[re.Pattern[str], ...]:
    patterns = []
    for text in row.texts("patterns"):
        # Anchored at the end: a path is known by its last parts, wherever the user keeps the dataset.
        pattern = row.compiled("patterns", rf"(?:{text})\Z")
        if "subject" not in pattern.groupindex or set(pattern.groupindex) - set(PATTERN_GROUPS):
            raise row.error(
                f"pattern {text!r} has the groups {sorted(pattern.groupindex)}; expected (?P<subject>...) and, where "
                "the path tells them, session, sequence and description"
            )
        patterns.append(pattern)
    return tuple(patterns)


def _id_rule(item: "_Mapping") -> IdRule:
    rule = _unfinished_id_rule(item)
    item.finish()
    return rule


def _unfinished_id_rule(item: "_Mapping") -> IdRule:
    return IdRule(
        pattern=item.regex("pattern"),
        pad=item.whole_number("pad"),
        prefix=item.text("prefix"),
        case=item.choice("case", ("", "upper", "lower")),
        date=item.texts("date"),
        optional=item.flag("optional", False),
    )


def _key_column(item: "_Mapping") -> KeyColumn:
    key = KeyColumn(
        column=item.texts("column"),
        rule=_unfinished_id_rule(item),
        constant=item.text("constant"),
        within_days=item.whole_number("within_days"),
    )
    item.finish()
    if bool(key.column) == bool(key.constant):
        raise item.error("expected either column or constant")
    if key.within_days and not key.rule.date:
        raise item.error("within_days needs the format of the dates as date")
    return key


def _skip_rule(item: "_Mapping") -> SkipRule:
    rule = SkipRule(
        pattern=item.regex("pattern", required=True),
        code=item.text("code", required=True, form=_CODE),
        words=item.text("words", required=True),
    )
    item.finish()
    return rule


def _sequence_rule(item: "_Mapping") -> SequenceRule:
    tags = item.pairs("tags")
    rule = SequenceRule(
        pattern=item.regex("pattern"),
        tags=tuple((keyword, item.compiled(f"tags.{keyword}", str(text))) for keyword, text in tags),
        sequence=item.choice("sequence", ("", *SEQUENCES)),
        code=item.text("code", form=_CODE),
        words=item.text("words"),
    )
    item.finish()
    if rule.pattern is None and not rule.tags:
        raise item.error("expected a pattern or tags")
    if bool(rule.sequence) == bool(rule.code and rule.words):
        raise item.error("expected either a sequence, or code and words of the reason to leave the series")
    return rule


def _repeats(item: "_Mapping") -> Repeats:
    repeats = Repeats(
        keep=item.choice("keep", ("all", "first", "last")),
        per=item.choice("per", ("session", "subject")),
        prefer=tuple(item.compiled("prefer", text) for text in item.texts("prefer")),
    )
    item.finish()
    return repeats


def _label_table(item: "_Mapping") -> LabelTable:
    table = LabelTable(
        files=item.regex("files", required=True),
        subject=_key_column(item.mapping("subject")),
        session=_key_column(item.mapping("session")) if item.has("session") else None,
        columns=tuple(_label_column(name, column) for name, column in item.named_mappings("columns")),
        encoding=item.text("encoding") or "utf-8-sig",
        sheet=item.text("sheet"),
        where=tuple((column, item.compiled(f"where.{column}", str(text))) for column, text in item.pairs("where")),
        contradictions=item.choice("contradictions", ("error", "missing")),
    )
    item.finish()
    known: list[str] = []
    for column in table.columns:
        arguments = dict(column.arguments)
        for name in [*arguments.get("columns", ()), *(arguments[key] for key in ("start", "end", "time", "event")
                                                      if key in arguments)]:  # fmt: skip
            if name not in known:
                raise item.error(f"columns.{column.name} is made from {name!r}; expected one further up: {known}")
        known.append(column.name)
    return table


def _label_column(name: str, item: "_Mapping") -> LabelColumn:
    if not _COLUMN.fullmatch(name):
        raise item.error(f"found the name {name!r}; expected lower-case letters, digits and _, such as age_years")
    derive = item.choice("derive", ("", *DERIVATIONS))
    wanted = DERIVATIONS.get(derive, ())
    column = LabelColumn(
        name=name,
        column=item.texts("column"),
        optional=item.flag("optional", False),
        kind=item.choice("kind", KINDS_OF_COLUMN),
        values=tuple((key, str(value)) for key, value in item.pairs("values")),
        otherwise=item.text("otherwise"),
        missing=item.texts("missing"),
        factor=item.number("factor", 1.0),
        date=item.texts("date"),
        derive=derive,
        arguments=tuple(
            (key, item.texts(key) if key == "columns" else item.whole_number(key) if key == "days" else item.text(key))
            for key in wanted
        ),
        write=item.flag("write", True),
    )
    item.finish()
    if bool(column.column) == bool(column.derive):
        raise item.error("expected either column or derive")
    if (column.kind == "date") != bool(column.date):
        raise item.error("a column of kind date needs its format as date, and no other column has one")
    return column


def _plain(value: Any) -> Any:
    """Lists as tuples, so that a row can be compared, hashed and sent to other processes."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value


class _Mapping:
    """A mapping of the file. Keys are known by being asked for; :meth:`finish` refuses the others."""

    def __init__(self, content: Any, file: str, place: str):
        self.file, self.place, self.asked = file, place, list[str]()
        if not isinstance(content, dict) or not all(isinstance(key, (str, int, float)) for key in content):
            raise self.error(f"found {content!r:.60}; expected keys with values")
        self.content: dict[str, Any] = {str(key): value for key, value in content.items()}

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.file}: {self.place}: {message}")

    def finish(self) -> None:
        for key in self.content:
            if key not in self.asked:
                close = difflib.get_close_matches(key, self.asked, n=1)
                raise self.error(
                    f"unknown key {key!r}{f', did you mean {close[0]!r}?' if close else ';'} "
                    f"accepted are {', '.join(self.asked)}"
                )

    def has(self, key: str) -> bool:
        return self._get(key) is not None

    def text(self, key: str, *, required: bool = False, form: re.Pattern[str] | None = None) -> str:
        value = self._get(key)
        if value is None:
            if required:
                raise self.error(f"{key} is missing; expected text")
            return ""
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise self.error(f"{key}: found {value!r:.60}; expected text")
        if form is not None and not form.fullmatch(str(value)):
            raise self.error(f"{key}: found {value!r}; expected {form.pattern}")
        return str(value).strip()

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; a single one may stand without its list."""
        value = self._get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items):
            raise self.error(f"{key}: found {value!r:.60}; expected texts")
        return tuple(str(item) for item in items)

    def choice(self, key: str, accepted: Sequence[str]) -> str:
        """One of ``accepted``; the first of them when the key is not there."""
        return self.one_of(key, self.text(key), accepted) if self.has(key) else accepted[0]

    def choices(self, key: str, accepted: Sequence[str]) -> tuple[str, ...]:
        return tuple(self.one_of(key, text, accepted) for text in self.texts(key))

    def one_of(self, key: str, value: Any, accepted: Sequence[str]) -> str:
        if value not in accepted:
            raise self.error(f"{key}: found {value!r}; expected {', '.join(filter(None, accepted))}")
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if not isinstance(value, (bool, type(None))):
            raise self.error(f"{key}: found {value!r}; expected true or false")
        return default if value is None else value

    def whole_number(self, key: str) -> int:
        value = self._get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise self.error(f"{key}: found {value!r}; expected a whole number, 0 or more")
        return value or 0

    def number(self, key: str, default: float) -> float:
        value = self._get(key)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise self.error(f"{key}: found {value!r}; expected a number")
        return default if value is None else float(value)

    def regex(self, key: str, *, required: bool = False) -> Any:
        """A pattern that ignores case; None when the key is not there and not required."""
        text = self.text(key, required=required)
        return self.compiled(key, text) if text else None

    def compiled(self, key: str, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text, re.IGNORECASE)
        except re.error as error:
            raise self.error(f"{key}: {text!r} is no regular expression: {error}") from error

    def pairs(self, key: str) -> tuple[tuple[str, Any], ...]:
        """A mapping whose keys are the user's own."""
        value = self._get(key)
        return () if value is None else tuple(_Mapping(value, self.file, f"{self._at(key)}").content.items())

    def mapping(self, key: str) -> "_Mapping":
        return _Mapping(self._get(key), self.file, self._at(key))

    def mappings(self, key: str) -> list["_Mapping"]:
        value = self._get(key)
        if not isinstance(value, (list, type(None))):
            raise self.error(f"{key}: found {value!r:.60}; expected a list")
        return [_Mapping(item, self.file, f"{self._at(key)}[{number}]") for number, item in enumerate(value or ())]

    def named_mappings(self, key: str) -> list[tuple[str, "_Mapping"]]:
        return [(name, _Mapping(item, self.file, f"{self._at(key)}.{name}")) for name, item in self.pairs(key)]

    def _at(self, key: str) -> str:
        return key if self.place == "the file" else f"{self.place}.{key}"

    def _get(self, key: str) -> Any:
        if key not in self.asked:
            self.asked.append(key)
        return self.content.get(key)
