"""A vLLM plugin for LoRA on CPUs: corrects and accelerates vLLM's own LoRA arithmetic (docs/concepts/cpu-lora.md)."""
