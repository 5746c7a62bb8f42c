"""A SKILL.md taken apart: front matter, sections, and the spans that only work word for word.

    read(path)        -> Document         the text as it will be served, and what is known of it
    catalogue(skills) -> Document         of many skills, their names and descriptions
    sections(text)    -> [Section]        cut at headings; joined again they are the text
    spans(text)       -> [(begin, end)]   code, commands, paths, URLs, flags, numbers, prohibitions
    literals(text)    -> [str]            the short ones of them: what can be asked back

The text is normalised once (newlines, no BOM, no white space at the end) and never changed again:
its hash is that of a skill. Nothing is cut off: a text that is too long is refused where it meets
a model. A file is hostile until read: only YAML's safe subset is parsed, and a name that could be
a path is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from skimlm.errors import SkimError

MAX_BYTES = 4_000_000  # far above any model's context: what is larger is not a skill
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()&-]{0,63}")
FRONT = re.compile(r"---[ \t]*\n(.*?)^---[ \t]*$\n?", re.M | re.S)
FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})[^\n]*\n.*?(?:^\1\2[`~]*[ \t]*$|\Z)", re.M | re.S)
HEADING = re.compile(r"^#{1,6}[ \t]+\S.*$", re.M)
SPANS = re.compile(
    r"`[^`\n]+`"  # inline code
    r"|https?://[^\s)>\]]+"
    r"|(?<![\w-])--?[a-zA-Z][\w-]*(?:=\S+)?"  # flags
    r"|(?<![\w/.~-])(?:[.~]{0,2}/)?(?:[\w.-]+/)+(?:[\w-]+\.\w+|(?![\w-]))"  # paths
    r"|(?<![\w.])(?!\d+[.)]\s)\d[\d.,:%]*\w*"  # numbers with their unit, not those of lists
)
FORBIDS = re.compile(r"^[^\n]*\b(?:never|don't|do not|must not|not)\b[^\n]*$", re.M | re.I)


@dataclass(frozen=True)
class Document:
    """A skill's text (front matter included) and what its front matter says."""

    text: str
    name: str
    description: str
    source: str = field(default="", compare=False)  # plain name of the file it was read from

    @property
    def sha256(self) -> str:
        """Hash of the text: what makes a compressed skill stale when it changes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Section:
    """A heading with all up to the next one; `path` has the headings above it, outermost first."""

    path: tuple[str, ...]  # empty for what stands before the first heading
    text: str


def read(path: str | os.PathLike[str]) -> Document:
    """Read a SKILL.md, or a folder: its SKILL.md, else the catalogue of all the skills in it.

    SkimError in one line for anything that is none.
    """
    path = Path(path)
    if path.is_dir():
        own = [file for file in sorted(path.iterdir()) if file.name.lower() == "skill.md"]
        return read(own[0]) if own else _catalogue_of(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SkimError(f"{path}: {size:,} bytes, a skill has at most {MAX_BYTES:,}: split it")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkimError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    return replace(parse(text, str(path)), source=path.name)


def catalogue(skills: Iterable[Document]) -> Document:
    """What an agent reads of many skills in every request: a line of each."""
    lines = [catalogue_line(skill) for skill in skills]
    front = f"---\nname: skills\ndescription: Which of {len(lines)} skills to use when.\n---\n"
    return parse(front + "".join(lines))


def catalogue_line(skill: Document) -> str:
    """Name and description of a skill, as they stand in a catalogue."""
    return f"- **{skill.name}**: {skill.description}\n"


def _catalogue_of(folder: Path) -> Document:
    skills = [read(file) for file in find_some([folder])]
    return catalogue(sorted(skills, key=lambda skill: skill.name))


def find_some(places: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The same as `find`; SkimError where there is none."""
    places = [*places]
    if not (found := find(places)):
        raise SkimError(f"{', '.join(map(str, places))}: no skills: a SKILL.md has front matter")
    return found


def find(places: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The skills at some places: a file is one, a folder has those of all its folders.

    Where a folder holds a SKILL.md, its other files are that skill's; a folder without any in it or
    below is a collection of *.md files that begin with front matter.
    """
    found: set[Path] = set()
    for place in map(Path, places):
        if not place.is_dir():
            found.add(place)
        elif named := [file for file in place.rglob("*.md") if file.name.lower() == "skill.md"]:
            found.update(named)
        else:
            found.update(file for file in place.rglob("*.md") if _has_front_matter(file))
    return sorted(found)


def _has_front_matter(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(7).removeprefix(b"\xef\xbb\xbf").startswith(b"---")


def parse(text: str, where: str = "skill") -> Document:
    """Parse the text of a SKILL.md; `where` goes in front of complaints."""
    text = normalise(text)
    if not text:
        raise SkimError(f"{where}: empty: a SKILL.md has front matter and instructions")
    if "\0" in text:
        raise SkimError(f"{where}: has NUL characters: not a text")
    match = FRONT.match(text)
    if not match:
        raise SkimError(
            f"{where}: no front matter: a SKILL.md begins with `---`, lines `name: ...` and"
            " `description: ...`, and `---`"
        )
    facts = _front_matter(match[1], where)
    if not text[match.end() :].strip():
        raise SkimError(f"{where}: nothing after the front matter: there is no skill to compress")
    name = check_name(facts["name"], where)
    return Document(text, name, " ".join(facts["description"].split()))


def normalise(text: str) -> str:
    """Make one text of what editors and systems write differently."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip()


def _front_matter(block: str, where: str) -> dict[str, str]:
    """Name and description; YAML first, plain `key: value` lines where it is not quite YAML."""
    import yaml

    try:
        loaded = yaml.safe_load(block)
    except (yaml.YAMLError, RecursionError, ValueError):
        loaded = dict(re.findall(r"^(\w+):[ \t]*(.+)$", block, re.M))
    if not isinstance(loaded, dict):
        raise SkimError(f"{where}: front matter is not a list of `key: value` lines")
    facts = {}
    for key in ("name", "description"):
        value = loaded.get(key)
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise SkimError(f"{where}: front matter has no {key}: add a line `{key}: ...`")
        facts[key] = str(value).strip()
    return facts


def check_name(name: str, where: str) -> str:
    """Refuse a name that could act as a path or hide what it is."""
    if not NAME.fullmatch(name.replace("/", " ")) or re.search(r"\.\.|^/|/$|/\.|\./|//", name):
        raise SkimError(
            f"{where}: name {name[:80]!r}: 1 to 64 letters, digits, spaces and ._+()&- are allowed"
        )
    return name


# ---- parts


def sections(text: str) -> list[Section]:
    """Cut a text at its headings; a `#` inside a code fence is none."""
    fences = [match.span() for match in FENCE.finditer(text)]
    heads = [m for m in HEADING.finditer(text) if not _inside(m.start(), fences)]
    cuts = [*(match.start() for match in heads), len(text)]
    parts = [Section((), text[: cuts[0]])] if cuts[0] else []
    path: list[tuple[int, str]] = []
    for match, end in zip(heads, cuts[1:], strict=True):
        title = match[0].lstrip("#")
        level = len(match[0]) - len(title)
        path = [entry for entry in path if entry[0] < level] + [(level, title.strip(" \t#*`"))]
        parts.append(Section(tuple(name for _, name in path), text[match.start() : end]))
    return parts


def chunks(text: str, limit: int, count: object) -> list[Section]:
    """Sections of at most `limit` tokens by `count(str) -> int`: longer ones cut at lines.

    Joined they are the text. A single line over the limit stays whole: nothing is lost.
    """
    assert callable(count)
    parts = []
    for section in sections(text):
        if count(section.text) <= limit:
            parts.append(section)
            continue
        held = ""
        for line in section.text.splitlines(keepends=True):
            if held and count(held + line) > limit:
                parts.append(Section(section.path, held))
                held = ""
            held += line
        parts.append(Section(section.path, held))
    return parts


def spans(text: str) -> list[tuple[int, int]]:
    """Where the text must stay as it is, ascending and apart: [begin, end) in characters."""
    found = [match.span() for match in FENCE.finditer(text)]
    found += [m.span() for m in (*SPANS.finditer(text), *FORBIDS.finditer(text))]
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def literals(text: str) -> list[tuple[int, str]]:
    """Strings a user copies, with their first place: inline code, URLs, flags, paths, numbers.

    Of a code fence, each line. The front matter has none: nobody asks for it.
    """
    begin = body_start(text)
    found: dict[str, int] = {}
    fences = list(FENCE.finditer(text, begin))
    for fence in fences:
        for line in re.finditer(r"^[ \t]*(\S.*?)[ \t]*$", fence[0], re.M):
            if not re.match(r"[`~]{3}", line[1]) and 4 <= len(line[1]) <= 80:
                found.setdefault(line[1], fence.start() + line.start(1))
    inside = [fence.span() for fence in fences]
    for match in SPANS.finditer(text, begin):
        value = match[0].strip("`").strip(".,:;")
        if 2 <= len(value) <= 80 and not _inside(match.start(), inside):
            found.setdefault(value, text.index(value, match.start()))
    return sorted((place, value) for value, place in found.items())


def body_start(text: str) -> int:
    """The first character after the front matter."""
    match = FRONT.match(text)
    return match.end() if match else 0


def _inside(place: int, ranges: list[tuple[int, int]]) -> bool:
    return any(begin <= place < end for begin, end in ranges)
