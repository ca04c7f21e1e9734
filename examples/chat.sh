#!/bin/sh
# Streams an answer. The lines that begin with a colon show the place in the queue while the request waits.
curl --no-buffer --fail-with-body "$SERVER/v1/chat/completions" \
    --header "Authorization: Bearer $KEY" \
    --header "Content-Type: application/json" \
    --data '{"model": "'"$MODEL"'", "stream": true, "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
