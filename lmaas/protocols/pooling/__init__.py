"""The protocols of models that embed texts: embeddings, scores of pairs, and rankings of documents."""
