"""SKILL.md files: what is read out of them, and what is refused in one line."""

import pytest

from skill_sample import TEXT
from skimlm.errors import SkimError
from skimlm.skills import questions
from skimlm.skills.document import chunks, find, literals, normalise, parse, read, sections, spans


def test_front_matter_gives_name_and_description():
    document = parse(TEXT)
    assert document.name == "tidy-notes"
    assert (
        document.description
        == "Sort loose notes into files. Use when: a folder of notes is a mess."
    )
    assert document.text == TEXT.rstrip()


def test_front_matter_that_is_not_quite_yaml_is_read_by_lines():
    text = TEXT.replace('"Sort loose', "Sort: loose").replace('mess."', "mess.")
    assert parse(text).description.startswith("Sort: loose notes")


def test_editors_and_systems_do_not_change_the_hash():
    windows = "\ufeff" + TEXT.replace("\n", "\r\n") + "\r\n\r\n"
    assert parse(windows).sha256 == parse(TEXT).sha256
    assert parse(TEXT.replace("every", "each")).sha256 != parse(TEXT).sha256


def test_sections_have_their_headings_and_are_the_whole_text():
    parts = sections(normalise(TEXT))
    assert "".join(part.text for part in parts) == normalise(TEXT)
    paths = [part.path for part in parts]
    assert paths == [(), ("Tidy notes",), ("Tidy notes", "Sorting"), ("Tidy notes", "Limits")]


@pytest.mark.parametrize("limit", [1, 20, 60, 10_000])
def test_chunks_lose_nothing_and_keep_to_their_limit(limit):
    parts = chunks(TEXT, limit, len)
    assert "".join(part.text for part in parts) == TEXT
    longest = max(len(line) for line in TEXT.splitlines(keepends=True))
    assert all(len(part.text) <= max(limit, longest) for part in parts)


def test_a_text_without_headings_is_one_section():
    assert [(s.path, s.text) for s in sections("words\n")] == [((), "words\n")]


def test_spans_are_what_must_stay_word_for_word():
    found = [TEXT[begin:end] for begin, end in spans(TEXT)]
    fence = "```sh\n# not a heading\nnotes move draft.md topics/garden/\n```"
    assert fence in found and "`notes scan --all`" in found
    assert "Never delete a note. See https://example.org/notes for 3 examples." in found
    assert all(a[1] < b[0] for a, b in zip(spans(TEXT), spans(TEXT)[1:], strict=False))


def test_literals_are_what_one_copies_with_their_places():
    found = literals(TEXT)
    assert [TEXT[place : place + len(value)] for place, value in found] == [v for _, v in found]
    values = [value for _, value in found]
    assert values == [
        "notes scan --all",
        "# not a heading",
        "notes move draft.md topics/garden/",
        "https://example.org/notes",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "x.md: empty"),
        ("# Only words\n", "x.md: no front matter"),
        ("---\nname: a\ndescription: b\n", "x.md: no front matter"),
        ("---\nname: a\n---\nbody", "x.md: front matter has no description"),
        ("---\ndescription: a\n---\nbody", "x.md: front matter has no name"),
        ("---\nname: [a]\ndescription: b\n---\nbody", "x.md: front matter has no name"),
        ("---\n- a\n- b\n---\nbody", "x.md: front matter is not a list of"),
        ("---\nname: a\ndescription: b\n---\n \n", "x.md: nothing after the front matter"),
        ("---\nname: a\ndescription: b\n---\nbo\0dy", "x.md: has NUL characters"),
        ("---\nname: !!python/name:os.system a\ndescription: b\n---\nx", None),
        ("---\n" + "a: {" * 5000 + "\n---\nx", "x.md: front matter has no name"),
    ],
)
def test_what_is_no_skill_is_refused_in_one_line(text, complaint):
    if complaint is None:  # read by lines, never executed
        with pytest.raises(SkimError, match="name '!!python"):
            parse(text, "x.md")
        return
    with pytest.raises(SkimError, match=complaint) as error:
        parse(text, "x.md")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/passwd", "a/../b", "..", ".hidden", "a\\b", "a\tb", "x" * 65, "a//b", "~"],
)
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(SkimError, match="1 to 64 letters"):
        parse(TEXT.replace("tidy-notes", repr(name)))


def test_names_people_use_are_allowed():
    assert (
        parse(TEXT.replace("tidy-notes", "Static Web Apps CI/CD")).name == "Static Web Apps CI/CD"
    )


def test_files_are_checked_before_they_are_parsed(tmp_path, monkeypatch):
    file = tmp_path / "SKILL.md"
    file.write_bytes(TEXT.encode()[:40] + b"\xff\xfe")
    with pytest.raises(SkimError, match=r"SKILL.md: not UTF-8 text \(byte 40\)"):
        read(file)
    file.write_text(TEXT)
    assert read(file) == parse(TEXT)
    monkeypatch.setattr("skimlm.skills.document.MAX_BYTES", 10)
    with pytest.raises(SkimError, match="a skill has at most 10: split it"):
        read(file)


# ---- questions


def test_questions_of_a_split_share_no_template_with_another():
    document = parse(TEXT)
    asked = {split: questions.questions(document, split, 40) for split in ("train", "dev", "test")}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not set(asked[a]) & set(asked[b])
    for table in (questions.SUBJECT, questions.WHOLE, questions.QUOTE):
        templates = [template for split in table.values() for template in split]
        assert len(templates) == len(set(templates))


def test_questions_are_always_the_same_and_as_many_as_asked_for():
    document = parse(TEXT)
    for count in (1, 10, 5000):
        asked = questions.questions(document, "train", count)
        assert len(asked) == count and asked == questions.questions(document, "train", count)
    assert len(set(questions.questions(document, "test", 64))) > 50


def test_questions_name_the_headings_and_words_of_the_text():
    found = questions.phrases(parse(TEXT).text)
    assert found[:4] == ["Tidy notes", "Sorting", "Limits", "main topic"]
    assert "`notes scan --all`" in found


def test_a_search_finds_skills_and_not_what_lies_beside_them(tmp_path):
    def put(name, text=TEXT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    flat = [put("flat/a.md"), put("flat/b.md", "\ufeff" + TEXT), put("flat/deep/c.md")]
    put("flat/README.md", "# All skills\n")
    skills = [put("folders/a/SKILL.md"), put("folders/b/skill.md")]
    put("folders/a/references/api.md", TEXT)
    put("folders/README.md", "# All skills\n")
    broken = put("flat/d.md", "---\nno end\n")
    assert find([tmp_path / "flat"]) == sorted([*flat, broken])
    assert find([tmp_path / "folders"]) == skills
    assert find([skills[1], tmp_path / "folders", flat[0]]) == sorted([flat[0], *skills])
    assert find([tmp_path / "folders/a/references/api.md"]) != []


def test_a_folder_is_its_skill_or_the_catalogue_of_its_skills(tmp_path):
    for name, text in (("b", TEXT), ("a", "---\nname: a1\ndescription: Does less.\n---\nDo it.\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "SKILL.md").write_text(text)
    assert read(tmp_path / "b") == parse(TEXT) and read(tmp_path / "b").source == "SKILL.md"
    both = read(tmp_path)
    assert both.text == (
        "---\nname: skills\ndescription: Which of 2 skills to use when.\n---\n"
        "- **a1**: Does less.\n"
        "- **tidy-notes**: Sort loose notes into files. Use when: a folder of notes is a mess."
    )
    assert both.source == ""
    asked = questions.questions(both, "dev", 99)
    assert "Tell me about tidy-notes." in asked
    (tmp_path / "none").mkdir()
    with pytest.raises(SkimError, match="none: no skills"):
        read(tmp_path / "none")
