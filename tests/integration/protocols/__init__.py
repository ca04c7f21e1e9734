"""Tests of protocols with real servers."""
