"""Reads prompts exactly as the engine with the same command line does, with vLLM's own request types, chat template and tokenizer. Names
and places are those of vLLM 0.32.0."""

import asyncio
import time
from dataclasses import replace
from typing import Any

from lmaas.engine.grammars.verdict import DETOKENIZE, INVALID, MAX_RETURNED, TOO_COMPLEX, Prompt, Tokens

CHAT = "/v1/chat/completions"
MAX_MESSAGE = 500
TOO_LONG = "The prompt is too long to be read without an engine. Send a shorter one, or split it."


class Refused(Exception):
    """The prompt is refused, for the given reason. `param` is the engine's parameter at fault, or empty."""

    def __init__(self, reason: str, param: str = "", code: str = INVALID) -> None:
        super().__init__(reason)
        self.param, self.code = param, code


class PromptReader:
    """The parts with which an engine's server reads prompts: the configuration of the model, the tokenizer, the chat template, the tool
    parser."""

    def __init__(self, arguments: list[str]) -> None:
        # Imported here, because the control plane reads the modules of this room without vLLM.
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 (only where the engine is)
        from vllm.entrypoints.launchers import cli_args  # noqa: PLC0415 (only where the engine is)
        from vllm.renderers.chat_utils import load_chat_template  # noqa: PLC0415 (only where the engine is)
        from vllm.renderers.online_renderer import OnlineRenderer  # noqa: PLC0415 (only where the engine is)
        from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415 (only where the engine is)
        from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415 (only where the engine is)
        from vllm.v1.engine import async_llm  # noqa: PLC0415 (only where the engine is)

        parsed = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        self.config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        self.model = self.config.model_config
        # Looked up through its module: in a process that the zygote forked, this returns the tokenizer that is already in memory.
        self._renderer = async_llm.renderer_from_config(self.config)
        self.tokenizer = self._renderer.get_tokenizer()
        self._online = OnlineRenderer(
            self.model,
            self._renderer,
            request_logger=None,
            chat_template=load_chat_template(parsed.chat_template),
            chat_template_content_format=parsed.chat_template_content_format,
            enable_auto_tools=parsed.enable_auto_tool_choice,
            exclude_tools_when_tool_choice_none=parsed.exclude_tools_when_tool_choice_none,
            tool_parser=parsed.tool_call_parser,
            tool_strict_level=parsed.tool_strict_level,
            reasoning_parser=parsed.structured_outputs_config.reasoning_parser,
            default_chat_template_kwargs=cli_args.resolve_default_chat_template_kwargs(parsed),
        )
        self.parser = self._online.parser
        self.pooling = self.model.runner_type == "pooling"
        self._chat, self._text = _request_types(self.pooling)
        self._online.warmup()  # compiles the chat template, once for all prompts

    def read(self, prompt: Prompt) -> Tokens:
        """Return the tokens of a prompt. Its length is not limited, so call this under limits of time and memory."""
        began = time.process_time()
        try:
            if prompt.path == DETOKENIZE:
                ids: Any = prompt.parameters["tokens"]
                self._renderer.validate_token_ids(ids, parameter="tokens")
                return Tokens(count=len(ids), text=str(self.tokenizer.decode(ids)), cpu_s=time.process_time() - began)
            ids = asyncio.run(self._ids(prompt))
            strings = self.tokenizer.convert_ids_to_tokens(ids) if prompt.strings else []
        except MemoryError:
            return Tokens(TOO_COMPLEX, TOO_LONG, cpu_s=time.process_time() - began)
        except Refused as refused:
            return Tokens(refused.code, str(refused), refused.param, cpu_s=time.process_time() - began)
        except Exception as error:  # noqa: BLE001 (whatever a client's messages make vLLM's own types and the model's template raise)
            return Tokens(INVALID, _reason(error), str(getattr(error, "parameter", None) or ""), cpu_s=time.process_time() - began)
        return Tokens(count=len(ids), ids=ids if prompt.ids else [], strings=strings, cpu_s=time.process_time() - began)

    async def _ids(self, prompt: Prompt) -> list[int]:
        parameters = {"model": "-"} | prompt.parameters
        if prompt.path == CHAT:
            read = await self._online.render_chat(self._chat.model_validate(parameters))
            # The conversation, and the prompt made of it.
            found = read[1] if isinstance(read, tuple) else read
        else:
            request = self._text.model_validate(parameters)
            found = await self._online.preprocess_completion(request, prompt_input=request.prompt, prompt_embeds=None)
        if not isinstance(found, list):
            raise Refused(found.error.message, found.error.param or "")
        ids = [token for one in found for token in one["prompt_token_ids"]]
        if (prompt.ids or prompt.strings) and len(ids) > MAX_RETURNED:
            raise Refused(f"The prompt has {len(ids)} tokens, and at most {MAX_RETURNED} are returned. Split it.", code=TOO_COMPLEX)
        return ids


def _request_types(pooling: bool) -> tuple[Any, Any]:
    """Return vLLM's types of a chat and of a text, but of prompts that may be longer than the model's context."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: PLC0415 (only where the engine is)
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest  # noqa: PLC0415 (only where the engine is)

    class Chat(ChatCompletionRequest):  # type: ignore[misc, unused-ignore]
        def build_tok_params(self, model_config: Any) -> Any:
            return replace(super().build_tok_params(model_config), max_total_tokens=None, max_output_tokens=0)

    class Text(TokenizeCompletionRequest):  # type: ignore[misc, unused-ignore]
        def build_tok_params(self, model_config: Any) -> Any:
            # Same as in a pooling engine's own types of requests.
            lower = bool(pooling and (model_config.encoder_config or {}).get("do_lower_case", False))
            return replace(super().build_tok_params(model_config), do_lower_case=lower)

    return Chat, Text


def _reason(error: Exception) -> str:
    """Return the reason of an error in one line, without vLLM's additions."""
    if callable(found := getattr(error, "errors", None)):  # pydantic's errors, whose text otherwise includes types and addresses
        first = found()[0]
        place = ".".join(str(step) for step in first["loc"])
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"[:MAX_MESSAGE].removeprefix(": ")
    text = " ".join(str(error.args[0] if error.args else error).split())
    return text[:MAX_MESSAGE] or "The model's chat template does not accept these messages."
