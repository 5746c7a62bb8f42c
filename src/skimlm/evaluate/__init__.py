"""What a model is worth: perplexity (perplexity.py) and tables for people (report.py).

Skills are measured in skills/evaluate.py, tasks in integrations/lm_eval.py.
"""

from skimlm.evaluate.perplexity import (
    Perplexity,
    held_out_text,
    read_text,
    summarise,
    token_nll,
    wikitext,
)
from skimlm.evaluate.report import (
    cache_facts,
    cache_text,
    environment,
    evaluation_text,
    facts_text,
    inspect_text,
    table,
    with_error,
)

__all__ = [
    "Perplexity",
    "cache_facts",
    "cache_text",
    "environment",
    "evaluation_text",
    "facts_text",
    "held_out_text",
    "inspect_text",
    "read_text",
    "summarise",
    "table",
    "token_nll",
    "wikitext",
    "with_error",
]
