"""An engine's log: filters the engine's output and writes it to files of bounded size."""
