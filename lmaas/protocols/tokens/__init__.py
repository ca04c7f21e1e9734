"""The tokens of prompts: vLLM's tokenize and detokenize, Anthropic's count_tokens, OpenAI's input_tokens."""
