"""The mathematics of compressing one linear: tensors in, tensors out.

No model and no file is seen here; bytes are in format/, the order of steps in pipeline/.
"""

from typing import Any

from skimlm.exports import exported

HOMES = {
    "kmeans_rows": "kmeans",
    "low_rank": "lowrank",
    "rank_of": "lowrank",
    "Sparsity": "mask",
    "wanda": "mask",
    "damped": "refine",
    "dense": "refine",
    "Options": "slim",
    "fit_paper": "slim",
}


def __getattr__(name: str) -> Any:
    return exported(__name__, HOMES, name)
