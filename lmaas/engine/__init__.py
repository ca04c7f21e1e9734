"""Talking to vLLM: how an engine is launched, what it is asked, how adapters come onto it, and our plugins inside it."""
