"""vLLM's own command line has the options that a base model may set."""

import json
import subprocess
import sys

import pytest

from lmaas.engine.arguments import SWITCHES, VALUED
from lmaas.engine.launch import has_engine


@pytest.mark.skipif(not has_engine(), reason="vLLM is not installed")
def test_vllm_knows_them_as_we_do() -> None:
    code = (
        "import json; from vllm.utils.argparse_utils import FlexibleArgumentParser;"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser;"
        "parser = make_arg_parser(FlexibleArgumentParser());"
        "print('\\n' + json.dumps({name: action.nargs for action in parser._actions for name in action.option_strings}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    known = json.loads(done.stdout.splitlines()[-1])
    assert {f"--{name}": known.get(f"--{name}", "unknown") for name in VALUED} == {f"--{name}": None for name in VALUED}
    for name in SWITCHES:
        assert (known.get(f"--{name}"), known.get(f"--no-{name}")) == (0, 0), name
