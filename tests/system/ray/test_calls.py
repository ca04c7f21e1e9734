"""Calls to Ray that hang, without a Ray."""

import subprocess
import sys

HUNG = """
import asyncio, time
from lmaas.config import Settings
from lmaas.control.provisioners.ray import RayProvisioner
from lmaas.errors import Unavailable

class Hung(RayProvisioner):
    def _connected(self, function, *arguments):
        time.sleep(3600)

async def main():
    provisioner = Hung(Settings(), call_s=0.1)
    for call in (provisioner.list(), provisioner.capacity(), provisioner.list()):
        try:
            print(await call)
        except Unavailable as error:
            print(error.message)

asyncio.run(main())
"""

LATE = "Ray has not responded within 0 s. See whether its head node is up."


def test_a_call_that_hangs_does_not_keep_the_controller_from_ending() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HUNG], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [LATE, "None", LATE], done.stderr
