"""The command line: it parses, calls `import skimlm` and prints. Nothing is computed here."""
