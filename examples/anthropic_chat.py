"""Stream an answer with Anthropic's library."""

import os

from anthropic import Anthropic

client = Anthropic()  # reads ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY
question = {"role": "user", "content": "What is the capital of France?"}
with client.messages.stream(model=os.environ["MODEL"], max_tokens=50, messages=[question]) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print(f"\n{stream.get_final_message().usage.output_tokens} tokens")
