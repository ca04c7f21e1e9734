"""The bars: what lmaas claims about speed and cost, measured side by side with its rivals in one run (`make bench`)."""
