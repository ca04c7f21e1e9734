"""Tools for the bars of `bench/gateway.py`: an engine, a load, and the proxies to compare."""
