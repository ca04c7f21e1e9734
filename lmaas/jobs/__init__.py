"""The process `lmaas jobs`, which does durable work: the lines of batches, and responses in the background."""
