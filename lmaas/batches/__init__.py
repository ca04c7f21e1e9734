"""Batches: files of requests that run when engines have room. Reading and checking their lines, and writing their results."""
