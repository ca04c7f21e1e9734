"""A vLLM plugin for LoRA on CPUs: corrects and accelerates vLLM's own LoRA arithmetic (docs/cpu-lora.md)."""
