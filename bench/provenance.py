"""Where a figure comes from: processor, cores, native library, commit, date."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

from skimlm import native


def provenance():
    """One line for under a table; a commit with changes on top of it is marked so."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    here = Path(__file__).parent
    commit = subprocess.run(git, capture_output=True, text=True, cwd=here).stdout.strip()
    return (
        f"{cpu}, {os.cpu_count()} cores, library {native.isa()}; "
        f"commit {commit or 'unknown'}; {datetime.date.today()}"
    )
