"""The zygote: a process per home folder that has imported vLLM once, and forks engines and their supervisors on request."""
