"""Compiles a request's grammar exactly as the engine with the same command line does, with vLLM's own request types, tool parsers,
validation and grammar library. Names and places are those of vLLM 0.32.0."""

import random
import re
import time
from typing import Any

from lmaas.engine.grammars.features import unsupported_feature
from lmaas.engine.grammars.prompts import CHAT, PromptReader
from lmaas.engine.grammars.verdict import COMPILATION_S, INVALID, MASK_S, TOO_COMPLEX, VALIDATION_S, Question, Verdict

#: The number of tokens of an answer that are tried.
STEPS = 64
MAX_MESSAGE = 500
#: The prefix of the grammar library's errors: the time, a place in its source, and the failed condition.
_SOURCE = re.compile(r"^\[[0-9:]+\] \S+?:\d+: (?:Check failed: \(.*?\) is false: )?", re.DOTALL)
ADVICE = "Use smaller counts in patterns, lengths and items, or fewer alternatives."


class Rejected(Exception):
    """The grammar cannot be used, for the given reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Compiler:
    """Holds the state that compilation needs for one base model that generates text: what its engines read prompts with, and the grammar
    library."""

    def __init__(self, reader: PromptReader) -> None:
        # Imported here, because the control plane reads this module's constants without vLLM.
        import xgrammar  # noqa: PLC0415 (only where the engine is)
        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend  # noqa: PLC0415 (only where the engine is)

        self._config, self._model, self._tokenizer, self._parser = reader.config, reader.model, reader.tokenizer, reader.parser
        self._end = int(self._tokenizer.eos_token_id)
        usual = xgrammar.GrammarCompiler
        # The same settings as in the engine, except for a single thread. Without its cache, the library takes other paths and accepts more.
        xgrammar.GrammarCompiler = lambda info, **given: usual(info, **(given | {"max_threads": 1}))
        self._backend = XgrammarBackend(self._config, tokenizer=self._tokenizer, vocab_size=self._model.get_vocab_size())
        xgrammar.GrammarCompiler = usual
        self.check(Question(CHAT, {"response_format": {"type": "json_object"}}))  # imports the rest, once for all checks

    def check(self, question: Question) -> Verdict:
        """Return the verdict on one request's grammar. Some grammars never finish compiling, so call this under limits of time and
        memory."""
        began = time.process_time()
        try:
            request, param = self._request(question)
        except Exception as error:  # noqa: BLE001 (whatever a client's parameters make vLLM's own types raise)
            return Verdict(INVALID, f"The engine does not accept it: {reason_of(error)}", _first(question.parameters))
        try:
            self._try(request)
        except Rejected as rejected:
            param = self._blamed(question, param)
            return Verdict(rejected.code, _told(rejected, param), param, time.process_time() - began)
        return Verdict(cpu_s=time.process_time() - began)

    def _request(self, question: Question) -> tuple[Any, str]:
        """Return the request as the engine's tool parser changes it, and the parameter that its grammar comes from."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: PLC0415 (only where the engine is)
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: PLC0415 (only where the engine is)

        if question.path != CHAT:
            return CompletionRequest.model_validate({"model": "-", "prompt": "-"} | question.parameters), _first(question.parameters)
        request = ChatCompletionRequest.model_validate({"model": "-", "messages": [{"role": "user", "content": "-"}]} | question.parameters)
        before = request.extract_structured_outputs()
        if self._parser is not None and (request.tool_choice != "none" or self._parser.reasoning_parser_cls is not None):
            parser = self._parser(self._tokenizer, request.tools, model_config=self._model, chat_template_kwargs={})
            request = parser.adjust_request(request=request)
        return request, _first(question.parameters) if request.extract_structured_outputs() == before else "tools"

    def _try(self, request: Any) -> None:
        """Validate and compile the grammar, and try the first tokens of an answer. Raises Rejected."""
        from vllm.v1.serial_utils import MsgpackEncoder  # noqa: PLC0415 (only where the engine is)
        from vllm.v1.structured_output.request import get_structured_output_key  # noqa: PLC0415 (only where the engine is)

        began = time.process_time()
        try:
            params = request.to_sampling_params(STEPS, {})
            if params.structured_outputs is None:
                return
            params.verify(self._model, None, self._config.structured_outputs_config, self._tokenizer)
            validated = time.process_time()
            _within(VALIDATION_S, validated - began, "reading it")
            MsgpackEncoder().encode(params)  # as it is sent from the engine's server to its core
            kind, text = get_structured_output_key(params.structured_outputs)
            grammar = self._backend.compile_grammar(kind, text, stop_token_ids=params.all_stop_token_ids)
            _within(COMPILATION_S, time.process_time() - validated, "compiling it")
            self._walk(grammar)
        except Rejected:
            raise
        except MemoryError:
            raise Rejected(TOO_COMPLEX, "compiling it takes too much memory") from None
        except Exception as error:
            if "bad_alloc" in str(error):
                raise Rejected(TOO_COMPLEX, "compiling it takes too much memory") from None
            raise Rejected(INVALID, unsupported(request) or reason_of(error)) from error

    def _walk(self, grammar: Any) -> None:
        """Accept some tokens that the grammar allows, computing the mask before each. Raises Rejected."""
        mask = self._backend.allocate_token_bitmask(1)
        choose = random.Random(0)  # noqa: S311 (the same grammar shall always have the same verdict)
        for step in range(STEPS):
            if grammar.is_terminated():
                return
            began = time.process_time()
            grammar.fill_bitmask(mask, 0)
            _within(MASK_S, time.process_time() - began, "following it from token to token")
            words = [(index, word) for index, word in enumerate(mask[0].tolist()) if word]
            if not words:
                raise Rejected(INVALID, "it allows no answer, or leads to a place from which none can be finished")
            if step == 0 and len(words) == 1 and words[0] == (self._end // 32, 1 << self._end % 32):
                raise Rejected(INVALID, "the only answer that it allows is an empty one")
            index, word = choose.choice(words)
            token = index * 32 + choose.choice([bit for bit in range(32) if word >> bit & 1])
            if not grammar.accept_tokens("check", [token]):
                raise Rejected(INVALID, "the grammar library does not follow it")

    def _blamed(self, question: Question, param: str) -> str:
        """Return the parameter at fault, for a grammar that was made of tools and a response format together."""
        others = {name: value for name, value in question.parameters.items() if name not in ("tools", "tool_choice")}
        if param != "tools" or not _first(others):
            return param
        try:
            self._try(self._request(Question(question.path, others))[0])
        except (Rejected, ValueError):
            return _first(others)
        return param


def _within(limit_s: float, spent_s: float, what: str) -> None:
    if spent_s > limit_s:
        raise Rejected(TOO_COMPLEX, f"{what} takes {spent_s:.1f} s, and {limit_s:g} s are allowed")


def _first(parameters: dict[str, Any]) -> str:
    """Return the parameter that requests a grammar. As in the engine, response_format takes precedence over structured_outputs."""
    if (parameters.get("response_format") or {}).get("type", "text") != "text":
        return "response_format"
    return next((name for name in ("structured_outputs", "tools") if parameters.get(name)), "")


def unsupported(request: Any) -> str:
    """Describe the part of the JSON schema that the grammar library cannot enforce. Empty if it can enforce all of it."""
    structured = request.extract_structured_outputs()
    feature = unsupported_feature(structured.json) if structured is not None and isinstance(structured.json, dict) else ""
    return f"the grammar library of this service cannot enforce {feature}" if feature else ""


def reason_of(error: BaseException) -> str:
    """Return the grammar library's reason without its source location and without vLLM's sentence around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if callable(found := getattr(error, "errors", None)):  # pydantic's errors, whose text otherwise includes types and addresses
        first = found()[0]
        place = ".".join(str(step) for step in first["loc"])
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"[:MAX_MESSAGE].removeprefix(": ")
    text = _SOURCE.sub("", str(error).removeprefix("Failed to transform json schema into a grammar: ")).strip()
    return text[:MAX_MESSAGE].rstrip(".") or "the grammar library of this service cannot compile it"


def _told(rejected: Rejected, param: str) -> str:
    what = "The tools' parameters cannot be used" if param == "tools" else f"'{param}' cannot be used"
    return f"{what}: {rejected}." + (f" {ADVICE}" if rejected.code == TOO_COMPLEX else "")
