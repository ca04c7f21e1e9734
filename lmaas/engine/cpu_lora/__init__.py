"""A vLLM plugin: LoRA on vLLM's CPU backend, right for every token and fast. What it corrects and how: docs/cpu-lora.md."""
