"""Calibration text under a short name: what a file holds, and the token windows made of it."""

from skimlm.pipeline.text import default_text, read_documents, windows

__all__ = ["default_text", "read_documents", "windows"]
