"""Run many requests as a batch, at half the price, and print their answers."""

import json
import os
import time

from openai import OpenAI

client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
lines = [
    {
        "custom_id": country,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": os.environ["MODEL"],
            "max_tokens": 20,
            "messages": [{"role": "user", "content": f"What is the capital of {country}?"}],
        },
    }
    for country in ("France", "Italy", "Spain")
]
content = "".join(json.dumps(line) + "\n" for line in lines).encode()
file = client.files.create(file=("requests.jsonl", content), purpose="batch")
batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
while batch.status in ("validating", "in_progress", "finalizing"):
    time.sleep(0.5)
    batch = client.batches.retrieve(batch.id)
print(batch.status)
if batch.output_file_id:
    for line in client.files.content(batch.output_file_id).text.splitlines():
        result = json.loads(line)
        print(result["custom_id"], "-", result["response"]["body"]["choices"][0]["message"]["content"])
