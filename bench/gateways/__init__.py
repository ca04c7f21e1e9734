"""What the gateway's bars are measured with: an engine, a load, and the proxies side by side. `bench/gateway.py` has the bars."""
