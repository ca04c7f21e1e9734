"""Anthropic's Messages protocol, translated to chats: requests, streams, whole answers."""
