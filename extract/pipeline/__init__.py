"""Decode -> batch -> encode -> write: in one process, on several devices, on a Ray cluster, in SLURM arrays."""
