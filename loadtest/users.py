"""The base user of all scenarios, which streams chat and measures it, and the hooks that connect Locust to a service."""

import json
import logging
import random
import sys
import time
from contextlib import ExitStack
from typing import Any, ClassVar

import gevent
import requests
from locust import User, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import LocalRunner

from lmaas import config
from lmaas.errors import ApiError, LmaasError, SettingsError
from loadtest import population, report
from loadtest.batch import background_batch
from loadtest.population import Population, Target
from loadtest.service import Service, connect
from loadtest.stream import Stream
from loadtest.tally import Tally

log = logging.getLogger(__name__)

CONNECT_S = 10.0
#: The tenants that are created unless the run has other ones.
NEW_TENANTS = 8
#: The silence after which a stream counts as dead. A request may wait for a cold start as long as the service allows.
SILENCE_S = 330.0
PROMPT_WORDS = (8, 120)
ANSWER_TOKENS = (8, 96)
WORDS = "the of a river city who when winter answer because seven bread light small north market story under engine green"


class ChatUser(User):
    """A client that streams chat completions and reports for each, under the name that the scenario chose:

    - `E2E`, the request itself: until its last byte, in ms. Locust's total, its charts and its failures are of these alone.
    - `TTFT`, `ITL` in ms: until the first token, and between tokens. `tok/s`: the speed of decoding; its size column has the number of
      completion tokens.
    - `cut`, `429`: requests that ended so on purpose, in ms until that end. They are not failures.
    """

    abstract = True
    service: ClassVar[Service]
    population: ClassVar[Population]
    #: Figures that Locust's statistics do not keep.
    tally: ClassVar[Tally]
    #: True if the scenario exceeds its limits on purpose.
    expects_429: ClassVar[bool] = False
    #: True if an engine must run at the beginning, so that the figures contain no cold start.
    starts_warm: ClassVar[bool] = True
    #: True if the scenario stops engines.
    needs_operator: ClassVar[bool] = False
    #: The tenants that the scenario needs at least.
    least_tenants: ClassVar[int] = 1

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.chance = random.Random()
        self._http = requests.Session()
        # Reading proxy settings anew for each request costs more than the request.
        self._http.trust_env = False

    def on_stop(self) -> None:
        """Close the connections."""
        self._http.close()

    def chat(self, target: Target, name: str, cut_after_s: float | None = None) -> None:
        """Stream one answer. With `cut_after_s` the client disconnects after that time if the request has not ended."""
        body = json.dumps(question(target.model, self.chance))
        headers = {"authorization": f"Bearer {target.key}", "content-type": "application/json"}
        url = f"{self.service.root}/v1/chat/completions"
        stream, refused, problem, code, ended = Stream(time.perf_counter()), None, None, "", False
        try:
            with (
                gevent.Timeout(cut_after_s, False),
                self._http.post(url, data=body, headers=headers, stream=True, timeout=(CONNECT_S, SILENCE_S)) as response,
            ):
                if response.status_code == 200:
                    self.tally.sent(response.headers.get("x-request-id", ""), name)
                    # requests returns each chunk when it arrives. Locust's faster client waits for 1024 bytes, so it cannot measure TTFT.
                    for line in response.iter_lines():
                        stream.read(line, time.perf_counter())
                    problem = stream.error or (None if stream.done else "the stream ended without [DONE]")
                    code = "" if problem is None else f"in the stream: {stream.code or 'no [DONE]'}"
                else:
                    refused = response.status_code
                    problem = code = f"HTTP {refused} {response.json()['error']['code']}"
                ended = True
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            problem, code = f"{type(error).__name__}: {error}", type(error).__name__
        if problem is not None:
            self.tally.errors[name, code] += 1
        took_s = time.perf_counter() - stream.sent_at
        if refused == 429 and self.expects_429:
            self._figure("429", name, took_s * 1000)
        elif problem is None and not ended:
            self._figure("cut", name, took_s * 1000)
        else:
            exception = None if problem is None else Exception(problem)
            self.environment.events.request.fire(
                request_type="E2E", name=name, response_time=took_s * 1000, response_length=0, exception=exception, context={}
            )
            if problem is None:
                self._answered(name, stream)

    def _answered(self, name: str, stream: Stream) -> None:
        if stream.ttft_s is not None:
            self._figure("TTFT", name, stream.ttft_s * 1000)
        for gap_s in stream.gaps_s:
            self._figure("ITL", name, gap_s * 1000)
        self._figure("tok/s", name, stream.tokens_per_s, stream.tokens)

    def _figure(self, kind: str, name: str, value: float | None, size: int = 0) -> None:
        self.environment.stats.get(name, kind).log(value, size)


def question(model: str, chance: random.Random) -> dict[str, Any]:
    """A chat request of a random length, for an answer of a random length."""
    words = chance.choices(WORDS.split(), k=chance.randint(*PROMPT_WORDS))
    return {
        "model": model,
        "messages": [{"role": "user", "content": " ".join(words)}],
        "max_tokens": chance.randint(*ANSWER_TOKENS),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def warm(service: Service, target: Target) -> None:
    """Ensure that an engine runs. Raises requests.RequestException."""
    body = json.dumps(question(service.model, random.Random()))
    headers = {"authorization": f"Bearer {target.key}"}
    requests.post(f"{service.root}/v1/chat/completions", data=body, headers=headers, timeout=SILENCE_S).raise_for_status()


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    """Add the options of a run to Locust's own."""
    parser.add_argument("--url", help="address of the service; by default LMAAS_URL, or the service of `make up`")
    parser.add_argument("--key", help="key of an operator or a tenant; by default LMAAS_API_KEY", is_secret=True)
    parser.add_argument("--model", help="base model under load, and only adapters of it; by default the first one that generates text")
    parser.add_argument("--tenants", type=int, help="tenants to make for the run; 0: call what exists. By default 8 with an operator's key")
    parser.add_argument("--adapters", type=int, default=2, help="adapters to make for each of them")
    parser.add_argument("--batch-lines", type=int, default=0, help="lines of a batch that runs as background load; 0: no batch")
    parser.add_argument("--zipf", type=float, default=1.0, help="how uneven popularity is: the target of rank r is called as 1/r**zipf")


@events.init.add_listener
def prepare(environment: Environment, runner: object, **_: object) -> None:
    """Find the service and create the population. Both are stored in the users' class, because Locust passes nothing else to users."""
    if not isinstance(runner, LocalRunner):
        sys.exit("These load tests run in one Locust process: each one would make the same tenants.")
    options = environment.parsed_options
    assert options is not None  # noqa: S101 (a program's environment has them)
    # Suppresses a log line for each request of this process.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with ExitStack() as undo:
            service = ChatUser.service = connect(config.load(), options.url, options.key, options.model)
            users = [user for user in environment.user_classes if issubclass(user, ChatUser)]
            if any(user.needs_operator for user in users):
                service.operator.check_ready()
            options.tenants = tenants = options.tenants if options.tenants is not None else NEW_TENANTS if service.is_operator else 0
            if tenants:
                log.info("Making %d tenants with %d adapters each ...", tenants, options.adapters)
                undo.callback(population.remove, service)
                targets = population.make(service, tenants, options.adapters)
            else:
                targets = population.found(service, undo)
            ChatUser.population, ChatUser.tally = Population(targets, options.zipf), Tally()
            least = max((user.least_tenants for user in users), default=1)
            if len(ChatUser.population.tenants) < least:
                raise SettingsError(f"This scenario needs {least} tenants. Have some made with an operator's key: --tenants 8.")
            if options.batch_lines:
                undo.enter_context(background_batch(service, targets[-1], options.batch_lines))
            if all(user.starts_warm for user in users):
                log.info("Waiting for an engine ...")
                warm(service, targets[-1])
            at_end = undo.pop_all()
    except (LmaasError, ApiError, requests.RequestException) as error:
        sys.exit(str(error))
    environment.host = service.root

    def finish(**_: object) -> None:
        with at_end:
            ChatUser.tally.add_queue_times(service, {target.key for target in targets}, environment.stats)
            report.show(environment.stats, ChatUser.tally.errors, options.html_file)

    # At that time no user runs any more, and Locust has printed its tables and written its HTML.
    environment.events.quit.add_listener(finish)
