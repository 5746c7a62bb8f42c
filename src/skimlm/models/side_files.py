"""The small files that come with a model's tensors: tokenizer, templates, processor, licence."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

CARRIED = (
    *("*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.tiktoken", "*.spm", "*.bpe"),
    *("LICENSE", "LICENCE", "COPYING", "NOTICE"),
)
# what is made anew, or tells of a training or of other tensors
LEFT = ("config.json", "*.index.json", "adapter_*", "trainer_state.json")
TEMPLATES = "additional_chat_templates"  # the one folder that tokenizers read


def side_files(source: Path) -> list[Path]:
    """The files of a model folder, relative to it, that go along with any form of its weights."""
    found = [file.relative_to(source) for file in source.iterdir() if _goes_along(file)]
    found += [file.relative_to(source) for file in source.glob(f"{TEMPLATES}/*.jinja")]
    return sorted(file for file in found if (source / file).is_file())


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy them as they are; a link becomes the file it leads to."""
    for file in side_files(source):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, folder / file)


def _goes_along(file: Path) -> bool:
    carried, left = (any(fnmatchcase(file.name, p) for p in ps) for ps in (CARRIED, LEFT))
    return carried and not left
