"""The protocols that clients speak: how each is read, sent to an engine, and answered."""
