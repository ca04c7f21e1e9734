"""OpenAI's Responses API: requests are translated to the engine's chat endpoint, and its answers to items and events."""
