"""Tests with vLLM and its libraries, or with the whole service as processes, on Ray and in Docker (README.md)."""
