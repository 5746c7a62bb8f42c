"""A small skill of our own, and a model and tokenizer large enough to read it."""

from conftest import byte_tokenizer, tiny_model

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}>{% endif %}"
TEXT = """---
name: tidy-notes
description: "Sort loose notes into files. Use when: a folder of notes is a mess."
---

# Tidy notes

Read every note before moving one.

## Sorting

1. Run `notes scan --all` in the folder.
2. Put each note where its **main topic** is.

```sh
# not a heading
notes move draft.md topics/garden/
```

## Limits

Never delete a note. See https://example.org/notes for 3 examples.
"""


def skill_model(family="llama", **changes):
    return tiny_model(family, max_position_embeddings=4096, **changes)


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer
