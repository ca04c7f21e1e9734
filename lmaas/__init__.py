"""Serverless, multi-tenant LLM endpoints: many tenants' LoRA adapters share a few vLLM engines."""
