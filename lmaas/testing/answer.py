"""The fake engine's responses, which equal those of vLLM 0.32 byte for byte except for the text."""

import json
import time
from typing import Any

from lmaas.testing.generation import Sequence

FINGERPRINT = "vllm-0.32.0-fake"


def compact(value: Any) -> bytes:
    """Return a value as JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Answer:
    """Writes the response to one request, which has a list of choices for each of its prompts."""

    def __init__(self, answer_id: str, model: str, prompts: list[list[Sequence]], *, chat: bool) -> None:
        self._id, self._model, self._prompts, self._chat = answer_id, model, prompts, chat
        self.sequences = [sequence for choices in prompts for sequence in choices]
        kind = b"chat.completion.chunk" if chat else b"text_completion"
        created = b"%d" % time.time()
        self._head = b'data: {"id":%b,"object":"%b","created":%b,"model":%b,"choices":[' % (
            compact(answer_id),
            kind,
            created,
            compact(model),
        )
        # The parts that are the same in every event are written once.
        if chat:
            self._open, self._middle = b'{"index":%d,"delta":{"content":"', b'"},"logprobs":null,"finish_reason":'
            self._plain_end, self._details = b'null,"token_ids":null}]', b',"completion_tokens_details":null'
            self._finish_end = b'"%b","stop_reason":%b,"token_ids":null}]'
        else:
            self._open, self._middle = b'{"index":%d,"text":"', b'","logprobs":null,"finish_reason":'
            self._plain_end, self._details = b'null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]', b""
            self._finish_end = b'"%b","stop_reason":%b,"prompt_token_ids":null,"token_ids":null}]'
        self._begun = False

    def chunks(self, *, continuous: bool, usage: bool) -> bytes:
        """Return the new tokens since the last call, one event for each."""
        parts: list[bytes] = []
        if self._chat and not self._begun:
            for sequence in self.sequences:
                role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' % sequence.index
                parts += (self._head, role, self._usage(sequence, 0, continuous), b',"prompt_token_ids":null,"prompt_text":null}\n\n')
        self._begun = True
        for sequence in self.sequences:
            start = self._head + self._open % sequence.index
            while sequence.sent < sequence.made:
                piece = sequence.pieces[sequence.sent]
                sequence.sent += 1
                last = sequence.sent == sequence.made and sequence.finish is not None and sequence.finish != b"abort"
                if sequence.call is not None:
                    if last:
                        sequence.told = True
                        parts += (self._head, self._call(sequence), self._usage(sequence, sequence.sent, continuous), b"}\n\n")
                    continue
                end = self._finish_end % (sequence.finish or b"", sequence.stop_reason) if last else self._plain_end
                sequence.told = sequence.told or last
                mark = b',"system_fingerprint":"%b"' % FINGERPRINT.encode() if last and not usage else b""
                parts += (start, piece, self._middle, end, self._usage(sequence, sequence.sent, continuous), mark, b"}\n\n")
            if sequence.finish == b"abort" and not sequence.told:
                sequence.told = True
                empty = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":' if self._chat else self._open + self._middle
                end = self._finish_end % (b"abort", b"null")
                parts += (self._head, empty % sequence.index, end, self._usage(sequence, sequence.sent, continuous), b"}\n\n")
        return b"".join(parts)

    def _call(self, sequence: Sequence) -> bytes:
        """Return the whole call and the finish in one event, as vLLM does when both are ready at the same time."""
        function = {"name": sequence.call[0], "arguments": sequence.call[1]} if sequence.call else {}
        call = {"id": f"chatcmpl-tool-{sequence.index}", "type": "function", "index": 0, "function": function}
        choice = {"index": sequence.index, "delta": {"tool_calls": [call]}, "logprobs": None, "finish_reason": "tool_calls"}
        return compact(choice | {"stop_reason": None, "token_ids": None}) + b"]"

    def _usage(self, sequence: Sequence, made: int, continuous: bool) -> bytes:
        """Return the running usage, which in vLLM counts this choice and its prompt alone."""
        if not continuous:
            return b""
        prompt = sequence.prompt_tokens
        return b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}' % (prompt, prompt + made, made, self._details)

    def _total(self) -> tuple[int, int, int]:
        """Return the prompt, completion and cached tokens of the whole request. A prompt counts once for all its choices."""
        prompt = sum(choices[0].prompt_tokens for choices in self._prompts)
        return prompt, sum(sequence.made for sequence in self.sequences), self.sequences[0].cached_tokens

    def last(self) -> bytes:
        """Return the event with the usage of the whole request."""
        prompt, made, cached = self._total()
        created = b',"created_cache_tokens":0' if self._chat else b""
        usage = b'"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d' % (prompt, prompt + made, made)
        details = b'"prompt_tokens_details":{"cached_tokens":%d%b}' % (cached, created)
        return self._head + b'],"usage":{%b,%b},"system_fingerprint":"%b"}\n\n' % (usage, details, FINGERPRINT.encode())

    def whole(self) -> bytes:
        """Return the response in one piece."""
        choices: list[dict[str, Any]] = []
        for sequence in self.sequences:
            text = b"".join(sequence.pieces[: sequence.made]).decode()
            text = json.loads(f'"{text}"')
            message = {"role": "assistant", "content": text} | dict.fromkeys(
                ("refusal", "annotations", "audio", "function_call", "reasoning")
            )
            finish = (sequence.finish or b"").decode()
            if sequence.call is not None:
                name, arguments = sequence.call
                call = {"id": f"chatcmpl-tool-{sequence.index}", "type": "function", "function": {"name": name, "arguments": arguments}}
                message |= {"content": None, "tool_calls": [call]}
                finish = "tool_calls"
            said = {"message": message} if self._chat else {"text": text}
            ended = {"finish_reason": finish, "stop_reason": json.loads(sequence.stop_reason)}
            choices.append({"index": sequence.index, **said, "logprobs": None, **ended, "token_ids": None})
        prompt, made, cached = self._total()
        details = {"cached_tokens": cached, "created_cache_tokens": 0 if self._chat else None, "multimodal_tokens": None}
        answer = {
            "id": self._id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": {
                "prompt_tokens": prompt,
                "total_tokens": prompt + made,
                "completion_tokens": made,
                "prompt_tokens_details": details,
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
        }
        return compact(answer)
