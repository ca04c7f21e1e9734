"""Find the text that answers a question best, with the cosines of embeddings."""

import os

from openai import OpenAI

client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
texts = ["Paris is the capital of France.", "A sonnet has fourteen lines.", "Water boils at 100 degrees."]
answer = client.embeddings.create(model=os.environ["EMBEDDING_MODEL"], input=["What is the capital of France?", *texts])
question, *vectors = [item.embedding for item in answer.data]
scores = [sum(a * b for a, b in zip(question, vector, strict=True)) for vector in vectors]
for score, text in sorted(zip(scores, texts, strict=True), reverse=True):
    print(f"{score:.3f}  {text}")
