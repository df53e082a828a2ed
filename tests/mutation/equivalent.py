"""Mutants that no test can tell from the program, or that only a machine other than this can, and why.

Each entry is a file, a function, the beginning of the change as the report words it, and the reason.
"""

EQUIVALENT: list[tuple[str, str, str, str]] = []
