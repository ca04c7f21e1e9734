"""Upload the folder that PEFT's save_pretrained wrote: python upload_adapter.py NAME FOLDER

KEY must have the role tenant_admin.
"""

import os
import sys
from pathlib import Path

import httpx

name, folder = sys.argv[1], Path(sys.argv[2])
with (folder / "adapter_config.json").open("rb") as config, (folder / "adapter_model.safetensors").open("rb") as model:
    answer = httpx.post(
        f"{os.environ['SERVER']}/v1/adapters",
        headers={"Authorization": f"Bearer {os.environ['KEY']}"},
        data={"name": name, "base_model": os.environ["MODEL"]},
        files={"adapter_config": config, "adapter_model": model},
        timeout=300,
    )
if answer.is_error:
    error = answer.json()["error"]
    sys.exit(f"{error['code']}: {error['message']}")
adapter = answer.json()
print(f"{adapter['name']}@{adapter['version']} is live: rank {adapter['rank']}, {adapter['size_bytes']:,} bytes")
