"""Batches: what is in their input files, how their lines end, and their output files."""
