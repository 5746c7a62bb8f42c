"""docs/families.md knows every causal language model that the installed transformers has."""

import re
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOC = Path(__file__).parent.parent / "docs/families.md"


def test_every_family_of_transformers_is_in_the_table_or_named_below_it():
    known = set(re.findall(r"[\w-]+", DOC.read_text()))
    new = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known)
    assert not new, f"transformers has {', '.join(new)}: try them, then make docs/families.md anew"
