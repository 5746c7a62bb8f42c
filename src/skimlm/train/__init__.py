"""Training: one loop and one set of losses, for codebooks and for adapters.

Soft tokens and their compressor use the same loop from skills/.
"""
