"""An engine's log: what is kept of its output, in files of bounded size."""
