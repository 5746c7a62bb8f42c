"""Questions to study a skill by, made from its headings and phrases without any model.

    questions(document, split, count) -> [str]        split: "train", "dev" or "test"

Templates x subjects. Subjects are what the text names: its headings, what it sets in bold, its
code words, and its name. The splits share subjects but no template, so what is learned from one is
tested with words that were never trained on. Same document, same questions, always; a document too
small for `count` different ones repeats them (answers are sampled, so they still differ).
"""

from __future__ import annotations

import random
import re

from skimlm.skills.document import Document, body_start, literals, sections

SUBJECT = {
    "train": (
        "What does the skill say about {s}?",
        "List the steps for {s}.",
        "Explain {s} to a new colleague.",
        "What must I never do when it comes to {s}?",
        "Summarize {s} in a few sentences.",
        "Which commands, files or names belong to {s}?",
        "I am working on {s}. What should I do first?",
        "Give me an example for {s}.",
        "What is the most important rule for {s}?",
        "How do I check that {s} was done right?",
        "Why does {s} matter here?",
        "Write a short checklist for {s}.",
    ),
    "dev": (
        "Tell me about {s}.",
        "What do I have to know before I start with {s}?",
        "Walk me through {s}.",
        "What can go wrong with {s}?",
    ),
    "test": (
        "How should {s} be handled?",
        "Describe {s} as the skill puts it.",
        "Someone asks me about {s}. What do I answer?",
        "Which mistakes should be avoided with {s}?",
        "Turn {s} into short instructions.",
        "What comes next after {s}?",
        "Which details of {s} are easy to forget?",
        "When is {s} relevant?",
    ),
}
WHOLE = {
    "train": (
        "What is this skill for?",
        "When should I use this skill?",
        "Outline the whole procedure.",
        "What do I need before I begin?",
        "Which rules have no exceptions?",
        "What does a good result look like?",
        "Please apply the skill to my project and describe what you do.",
        "Which tools does the skill use?",
        "Name three things the skill warns about.",
        "Repeat the beginning of the skill.",
    ),
    "dev": (
        "Summarize the skill in three sentences.",
        "What are the main steps?",
        "What should I be careful about?",
    ),
    "test": (
        "In which situations does this skill help?",
        "Give me a plan based on this skill.",
        "What are the do's and don'ts?",
        "Which inputs does it take and what comes out?",
        "How do I get started?",
        "What would an expert do first?",
    ),
}
QUOTE = {
    "train": ('Continue exactly: "{s}', 'What follows this line: "{s}"?'),
    "dev": ('Complete the sentence: "{s} ...',),
    "test": ('How does this go on: "{s} ...', 'The skill says "{s}". What else does it say there?'),
}
SEED = {"train": 1, "dev": 2, "test": 3}


def questions(document: Document, split: str, count: int) -> list[str]:
    """`count` questions of one split, in a fixed shuffled order."""
    subjects = phrases(document.text)
    made = [template.format(s=s) for s in subjects for template in SUBJECT[split]]
    made += [template.format(s=s) for s in beginnings(document.text) for template in QUOTE[split]]
    made = list(dict.fromkeys(made))
    random.Random(SEED[split]).shuffle(made)
    made = [*WHOLE[split], *made]
    return (made * -(-count // len(made)))[:count]


def phrases(text: str) -> list[str]:
    """What the text names: headings, bold phrases and code words, each once, in this order."""
    body = text[body_start(text) :]
    found = [section.path[-1] for section in sections(body) if section.path]
    found += re.findall(r"\*\*([^*\n]{3,60})\*\*", body)
    found += [f"`{value}`" for _, value in literals(text) if len(value) <= 40][:12]
    cleaned = (re.sub(r"[*#]|^\d+[.)]\s|[:.!?,;\s]+$", "", p).strip() for p in found)
    return list(dict.fromkeys(phrase for phrase in cleaned if 2 < len(phrase) <= 80))


def beginnings(text: str) -> list[str]:
    """First halves of the body's longer lines of prose."""
    lines = text[body_start(text) :].splitlines()
    words = [re.sub(r"^[\s>*#-]+|^\s*\d+\.\s+", "", line).split() for line in lines]
    halves = [" ".join(line[: len(line) // 2][:12]) for line in words if len(line) >= 8]
    return list(dict.fromkeys(halves))
