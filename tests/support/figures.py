"""Changes to the numbers of a pool by tests."""

from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from lmaas.scheduling import client

#: The part of the library that defines the stored form, for scripts.
STORED = Path(client.__file__).with_name("layout.lua").read_text().split("\n", 1)[1]
_ADD = f"""{STORED}
local vars, field = {{}}, 'figures' .. LAYOUT
read_figures(vars, redis.call('HGET', KEYS[1], field))
vars[ARGV[1]] = vars[ARGV[1]] + ARGV[2]
redis.call('HSET', KEYS[1], field, packed_figures(vars))
"""


async def add_to_figure(redis: Redis, pool: str, name: str, number: int) -> None:
    """Add to one of a pool's figures (FIGURES in layout.lua)."""
    adding: Any = redis.eval(_ADD, 1, f"lmaas:{{{pool}}}:vars", name, str(number))
    await adding
