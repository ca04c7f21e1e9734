"""Start a response that runs without its client, and fetch it later."""

import os
import time

from openai import OpenAI

client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
response = client.responses.create(
    model=os.environ["MODEL"],
    input="What is the capital of France?",
    max_output_tokens=50,
    background=True,
)
print(response.id, response.status)
while response.status in ("queued", "in_progress"):
    time.sleep(0.5)
    response = client.responses.retrieve(response.id)
print(response.status)
print(response.output_text)
